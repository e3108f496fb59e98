//! An hour of everything that mirrors do, and what is left of it: nothing may grow.
//!
//! `cargo run --release -p benches --bin soak -- --seconds 3600`
//!
//! One thread makes mirrors of all sizes and kinds, has an accelerator work on them and drops them; another does so behind the
//! other door; some of them lose contents and change their address by bare system calls. A long-lived mirror is faulted to and fro,
//! brought home, forked from and pinned meanwhile. As root it has the kernel compact memory each second, beside which movement is
//! hardest. Once a minute (or `--every`) a line says what the process has: memory in RAM, page tables, descriptors, mappings, threads,
//! and what the runtime has counted. The first third is warm-up. The least that the process has in the last third may not exceed the
//! least that it had in the second, beyond what an allocator scatters; contents must be right, the runtime's anomalies 0, and nothing
//! may stand still from line to line. The last line is the verdict, and so is the exit status.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use accel_sim::Accelerator;
use anyhow::{Context, Result, ensure};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use svm::{Buffer, Delivery, Granule, Options};

/// Past this nobody waits; and no clock's end is reached.
const LONGEST: u64 = 10 * 365 * 24 * 3600;
/// Lines from which anything can be told: one for each third.
const LEAST_LINES: u64 = 3;

/// Does everything that mirrors do, over and over, and fails if anything grows, stands still or is lost
#[derive(Debug, Parser)]
#[command(name = "soak")]
struct Args {
    /// Seconds to run: long enough for three lines, up to ten years
    #[arg(long, value_name = "N", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..=LONGEST))]
    seconds: u64,
    /// Seconds between lines, 1 or more [default: a twentieth of --seconds, from 3 to 60]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=LONGEST))]
    every: Option<u64>,
}

impl Args {
    fn every(&self) -> u64 {
        self.every.unwrap_or((self.seconds / 20).clamp(3, 60))
    }

    /// Ends the program, with status 2, where it would run in vain.
    fn of_command_line() -> Self {
        let args = Self::parse();
        let (seconds, every) = (args.seconds, args.every());
        if seconds.div_ceil(every) < LEAST_LINES {
            let what = format!(
                "{seconds} s with a line every {every} s: too short to tell, {LEAST_LINES} lines are needed"
            );
            Self::command()
                .error(ErrorKind::ValueValidation, what)
                .exit();
        }
        args
    }
}

/// What the process has.
#[derive(Clone, Copy, Debug)]
struct Has {
    anonymous_kib: u64,
    page_tables_kib: u64,
    descriptors: u64,
    mappings: u64,
    threads: u64,
}

impl Has {
    fn now() -> Result<Self> {
        let status = std::fs::read_to_string("/proc/self/status")?;
        let field = |name: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let word = line.and_then(|line| line.split_whitespace().next());
            Ok(word.with_context(|| name.to_owned())?.parse()?)
        };
        Ok(Self {
            anonymous_kib: field("RssAnon:")?,
            page_tables_kib: field("VmPTE:")?,
            descriptors: std::fs::read_dir("/proc/self/fd")?.count() as u64,
            mappings: std::fs::read_to_string("/proc/self/maps")?.lines().count() as u64,
            threads: field("Threads:")?,
        })
    }

    /// What has grown since, beyond what an allocator and the scheduler scatter.
    fn growth_since(&self, warm: &Self) -> Vec<String> {
        let rows = [
            (
                "anonymous memory, KiB",
                warm.anonymous_kib,
                self.anonymous_kib,
                4096,
            ),
            (
                "page tables, KiB",
                warm.page_tables_kib,
                self.page_tables_kib,
                512,
            ),
            ("descriptors", warm.descriptors, self.descriptors, 0),
            ("mappings", warm.mappings, self.mappings, 16),
            ("threads", warm.threads, self.threads, 0),
        ];
        rows.into_iter()
            .filter(|(_, before, now, slack)| *now > before + slack)
            .map(|(name, before, now, _)| format!("{name}: {before} -> {now}"))
            .collect()
    }
}

const MIB: usize = 1 << 20;

/// A mirror from its making to its end, of a kind that `n` says.
fn one_life(accel: &Accelerator, n: u64, delivery: Delivery) -> Result<()> {
    let granules = [Granule::Page, Granule::Big, Granule::Huge];
    let options = Options::new()
        .delivery(delivery)
        .granule(granules[n as usize % 3])
        .huge_pages(n.is_multiple_of(5))
        .read_mostly(n.is_multiple_of(7));
    let len = [1_000, 70_000, MIB, 5 * MIB][n as usize % 4] / size_of::<u64>();
    if n.is_multiple_of(2) {
        let mut data = vec![n; len];
        let mut mirror = svm::mirror_with(&mut data, &options)?;
        accel.run(mirror.view_mut(), |data: &mut [u64]| {
            data.iter_mut().for_each(|x| *x += 1);
        })?;
        mirror.as_mut_slice()[0] += 1;
        accel.run_items(64, mirror.view_mut(), |_lane, i, data| {
            data.store(i * (len / 64), n)
        })?;
        mirror.close()?;
        ensure!(
            (data[0], data[len - 1]) == (n, n + 1),
            "a mirror lost a write"
        );
    } else {
        let mut data = Buffer::<u64>::with_options(len, &options)?;
        data.as_mut_slice().fill(n);
        for _ in 0..3 {
            accel.run(data.view_mut(), |data: &mut [u64]| {
                data.iter_mut().for_each(|x| *x += 1);
            })?;
            data.as_mut_slice()[len - 1] -= 1;
        }
        ensure!(
            (data.as_slice()[0], data.as_slice()[len - 1]) == (n + 3, n),
            "a buffer lost a write"
        );
    }
    Ok(())
}

/// A mirror of a mapping that loses a quarter of its contents, and then moves, by system calls that the runtime hears of afterwards.
fn bare_life(accel: &Accelerator, delivery: Delivery) -> Result<()> {
    const LEN: usize = MIB / 2;
    let (prot, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    let map = || -> Result<*mut u8> {
        // SAFETY: a new mapping, wherever the kernel likes.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), LEN, prot, flags, -1, 0) };
        ensure!(at != libc::MAP_FAILED, "no memory");
        Ok(at.cast())
    };
    let (old, new) = (map()?, map()?);
    let options = Options::new().delivery(delivery);
    // SAFETY: the mapping is this function's own, of which no reference exists; it stays, here or there, until the mirror is gone.
    let mut mirror = unsafe { svm::mirror_raw(old, LEN, &options) }?;
    accel.run(mirror.view_mut(), |data: &mut [u8]| data.fill(7))?;
    // SAFETY: the mirror's own memory, which nobody uses now. So with the others.
    let discarded = unsafe { libc::madvise(old.cast(), LEN / 4, libc::MADV_DONTNEED) };
    let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: as above; what was reserved there is given up.
    let moved = unsafe { libc::mremap(old.cast(), LEN, LEN, how, new) };
    ensure!(discarded == 0 && moved == new.cast(), "the kernel refused");
    for (at, expected) in [(0, 0), (LEN / 4 - 1, 0), (LEN / 4, 7), (LEN - 1, 7)] {
        // SAFETY: in the mapping.
        let found = unsafe { new.wrapping_add(at).read_volatile() };
        ensure!(found == expected, "byte {at} is {found} and not {expected}");
    }
    drop(mirror);
    // SAFETY: as above, for the last time.
    let gone = unsafe { libc::munmap(new.cast(), LEN) };
    ensure!(gone == 0, "the kernel refused");
    Ok(())
}

/// The long-lived mirror: to and fro, as long as it lasts.
fn long_life(accel: &Accelerator, data: &mut Buffer<u64>, n: u64) -> Result<()> {
    accel.run(data.view_mut(), |data: &mut [u64]| {
        data.iter_mut().for_each(|x| *x += 1);
    })?;
    let step = 4096 / size_of::<u64>();
    ensure!(
        data.as_slice().iter().step_by(step).all(|&x| x == n + 1),
        "the long-lived buffer lost a write"
    );
    if n.is_multiple_of(10) {
        drop(data.pin(..)?);
    }
    if n.is_multiple_of(15) {
        accel.release()?;
    }
    if n.is_multiple_of(50) {
        // SAFETY: the child makes one system call, which is async-signal-safe.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(0) };
        }
        ensure!(child > 0, "no child to be had");
        let mut status = 0;
        // SAFETY: our own child, and a place for its status.
        let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
        ensure!((waited, status) == (child, 0), "a child failed");
    }
    Ok(())
}

/// Has the kernel compact all memory: pages that are in the midst of a movement are then held by the kernel as well, and it has been
/// seen to lose count of what it has moved (`HAZARDS.md` M2). Says whether it may.
fn compact() -> bool {
    std::fs::write("/proc/sys/vm/compact_memory", "1").is_ok()
}

/// A thread that ends, whatever for, ends all.
struct StopsOthers<'a>(&'a AtomicBool);

impl Drop for StopsOthers<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn main() -> std::process::ExitCode {
    let args = Args::of_command_line();
    match soak(&args) {
        Ok(verdict) => {
            println!("soak: passed: {verdict}");
            std::process::ExitCode::SUCCESS
        }
        Err(error) => {
            println!("soak: FAILED: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// Says what it came to.
fn soak(args: &Args) -> Result<String> {
    let every = Duration::from_secs(args.every());
    let end = Instant::now() + Duration::from_secs(args.seconds);
    let (stop, lives, laps) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let accel = Accelerator::with_options(accel_sim::Options::new().workers(2))?;
    let mut long = Buffer::<u64>::zeroed(8 * MIB / size_of::<u64>())?;
    let mut seen: Vec<Has> = Vec::new();
    let ran = std::thread::scope(|scope| -> Result<()> {
        let short = |delivery, first: u64| {
            let (accel, stop, lives) = (&accel, &stop, &lives);
            move || -> Result<()> {
                let mut n = first;
                let _end = StopsOthers(stop);
                while !stop.load(Ordering::Relaxed) {
                    one_life(accel, n, delivery)?;
                    if n % 8 < 2 {
                        bare_life(accel, delivery)?;
                    }
                    lives.fetch_add(1, Ordering::Relaxed);
                    n += 2;
                }
                Ok(())
            }
        };
        let mut threads = vec![scope.spawn(short(Delivery::Inline, 0))];
        threads.push(scope.spawn(short(Delivery::Thread, 1)));
        let (accel, stop, laps) = (&accel, &stop, &laps);
        let compacts = compact();
        threads.push(scope.spawn(move || {
            while compacts && !stop.load(Ordering::Relaxed) {
                compact();
                std::thread::sleep(Duration::from_secs(1));
            }
            Ok(())
        }));
        let long = &mut long;
        threads.push(scope.spawn(move || {
            let _end = StopsOthers(stop);
            let mut n = 0;
            while !stop.load(Ordering::Relaxed) {
                long_life(accel, long, n)?;
                laps.fetch_add(1, Ordering::Relaxed);
                n += 1;
            }
            Ok(())
        }));
        if !compacts {
            println!("not beside compaction, which takes root");
        }
        println!(
            "    s   anonymous  page tables  fds  mappings  threads     lives      laps  anomalies"
        );
        let start = Instant::now();
        let outcome = (|| {
            let mut last = (0, 0);
            while Instant::now() < end && !stop.load(Ordering::Relaxed) {
                std::thread::sleep(every.min(end.saturating_duration_since(Instant::now())));
                let now = (lives.load(Ordering::Relaxed), laps.load(Ordering::Relaxed));
                let has = Has::now()?;
                let anomalies = accel.stats().runtime.anomalies;
                println!(
                    "{:5}  {:6} KiB   {:6} KiB  {:3}  {:8}  {:7}  {:8}  {:8}  {:9}",
                    start.elapsed().as_secs(),
                    has.anonymous_kib,
                    has.page_tables_kib,
                    has.descriptors,
                    has.mappings,
                    has.threads,
                    now.0,
                    now.1,
                    anomalies,
                );
                ensure!(now.0 > last.0 && now.1 > last.1, "something stands still");
                ensure!(anomalies == 0, "the runtime counted anomalies");
                last = now;
                seen.push(has);
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        outcome
    });
    ran?;
    // Samples are taken in the midst of lives, so a single one says little: the least of a third against the least of the last third.
    let least = |part: &[Has]| -> Option<Has> {
        part.iter().copied().reduce(|a, b| Has {
            anonymous_kib: a.anonymous_kib.min(b.anonymous_kib),
            page_tables_kib: a.page_tables_kib.min(b.page_tables_kib),
            descriptors: a.descriptors.min(b.descriptors),
            mappings: a.mappings.min(b.mappings),
            threads: a.threads.min(b.threads),
        })
    };
    let third = seen.len() / 3;
    ensure!(
        third > 0,
        "too short to tell: at least three lines are needed"
    );
    let (Some(warm), Some(last)) = (
        least(&seen[third..2 * third]),
        least(&seen[seen.len() - third..]),
    ) else {
        anyhow::bail!("no lines");
    };
    let growth = last.growth_since(&warm);
    ensure!(growth.is_empty(), "it has grown: {}", growth.join("; "));
    Ok(format!(
        "nothing has grown in {} s, {} lives and {} laps: {} -> {} KiB, {} -> {} descriptors, {} -> {} mappings, {} -> {} threads",
        args.seconds,
        lives.load(Ordering::Relaxed),
        laps.load(Ordering::Relaxed),
        warm.anonymous_kib,
        last.anonymous_kib,
        warm.descriptors,
        last.descriptors,
        warm.mappings,
        last.mappings,
        warm.threads,
        last.threads,
    ))
}
