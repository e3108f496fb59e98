//! The machine: what a result has to name to mean anything, and what a bench does to be undisturbed on it.

use std::ffi::CStr;
use std::fs::File;
use std::hint::black_box;
use std::io::Read as _;
use std::os::fd::FromRawFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;

use serde::Serialize;

/// Where and when a run was made.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Model name of the first CPU.
    pub cpu: String,
    /// CPUs that this process may use.
    pub nr_cpus: usize,
    /// Release of the kernel.
    pub kernel: String,
    /// Whether the kernel runs under a hypervisor.
    pub is_virtual: bool,
    /// Seconds since 1970 at the start of the run.
    pub unix_time: u64,
    /// Load averages (1, 5, 15 minutes) at the start: what else went on.
    pub load: String,
    /// What was built: the commit, "unknown" without git.
    pub commit: String,
    /// Whether files differed from it, results and the README apart, which a run writes.
    pub is_changed: bool,
}

impl Machine {
    /// Looks around. Asks nothing of the runtime: what that keeps from its first use on is measured later.
    #[must_use]
    pub fn here() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split(':').nth(1))
                .map_or_else(String::new, |value| value.trim().to_owned())
        };
        let read = |path: &str| {
            std::fs::read_to_string(path)
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        let head = git(&["rev-parse", "HEAD"]);
        let changes = git(&[
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            ":(top)",
            ":(top,exclude)benches/results",
            ":(top,exclude)README.md",
        ]);
        Self {
            cpu: field("model name"),
            nr_cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: read("/proc/sys/kernel/osrelease"),
            is_virtual: field("flags").split(' ').any(|flag| flag == "hypervisor"),
            unix_time: std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |d| d.as_secs()),
            load: read("/proc/loadavg"),
            commit: head.unwrap_or_else(|| "unknown".to_owned()),
            is_changed: changes.is_some_and(|changes| !changes.is_empty()),
        }
    }
}

/// What git answers where the benches' sources are.
fn git(args: &[&str]) -> Option<String> {
    let sources = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| ".".into());
    let mut git = std::process::Command::new("git");
    let output = git.arg("-C").arg(sources).args(args).output().ok()?;
    let answer = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| answer.trim().to_owned())
}

impl Machine {
    /// What was built, as a reader likes it.
    #[must_use]
    pub fn build(&self) -> String {
        let commit = self.commit.get(..12).unwrap_or(&self.commit);
        let changed = if self.is_changed { " with changes" } else { "" };
        format!("{commit}{changed}")
    }

    /// The day of the run, as in 2026-01-31 (UTC).
    #[must_use]
    pub fn date(&self) -> String {
        // Howard Hinnant's `civil_from_days`: years begin in March, so that the leap day is the last.
        let days = self.unix_time / 86_400 + 719_468;
        let (era, day) = (days / 146_097, days % 146_097);
        let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let of_year = day - (365 * year + year / 4 - year / 100);
        let month = (5 * of_year + 2) / 153;
        let (d, m) = (
            of_year - (153 * month + 2) / 5 + 1,
            if month < 10 { month + 3 } else { month - 9 },
        );
        format!("{:04}-{m:02}-{d:02}", year + era * 400 + u64::from(m <= 2))
    }
}

/// Confines the calling thread, and threads it will start, to one CPU. Without effect where there is no such CPU.
pub fn pin_to_cpu(cpu: usize) {
    set_affinity(|set| {
        // SAFETY: `set` is an initialised set, and CPU_SET ignores numbers beyond it.
        unsafe { libc::CPU_SET(cpu, set) }
    });
}

/// Lets the calling thread run on every CPU.
pub fn unpin() {
    set_affinity(|set| {
        for cpu in 0..std::thread::available_parallelism()
            .map_or(1, usize::from)
            .max(64)
        {
            // SAFETY: as in `pin_to_cpu`.
            unsafe { libc::CPU_SET(cpu, set) }
        }
    });
}

fn set_affinity(fill: impl FnOnce(&mut libc::cpu_set_t)) {
    // SAFETY: a cpu_set_t is an array of integers: zero is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    fill(&mut set);
    // SAFETY: `set` is initialised, and as large as the call is told.
    unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
}

/// What the kernel counts of this process. Where it offers no such count, a machine-wide one stands in, or none.
#[derive(Debug)]
pub struct Counters {
    system_calls: Option<Tracepoint>,
    flushes: Option<Tracepoint>,
}

/// One of the figures: what it counts, and whose count it is.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Counter {
    /// What.
    pub what: &'static str,
    /// Of which line or place of the kernel; or why there is none.
    pub source: &'static str,
}

impl Counters {
    /// How many figures there are.
    pub const NR: usize = 4;

    /// From here on, of all threads that there are now.
    #[must_use]
    pub fn of_this_process() -> Self {
        // `enum tlb_flush_reason`: the interrupt that has others flush, counted where it is sent.
        const REMOTE_SEND_IPI: &CStr = c"reason==4";
        Self {
            system_calls: Tracepoint::open("raw_syscalls/sys_enter", None),
            flushes: Tracepoint::open("tlb/tlb_flush", Some(REMOTE_SEND_IPI)),
        }
    }

    /// What they are, in the order of [`read`](Self::read).
    #[must_use]
    pub fn kinds(&self) -> [Counter; Self::NR] {
        let untraced = "not counted: tracefs is not mounted, or may not be read";
        let or = |tracepoint: &Option<Tracepoint>, traced, otherwise| match tracepoint {
            Some(_) => traced,
            None => otherwise,
        };
        let kind = |what, source| Counter { what, source };
        [
            kind(
                "system calls",
                or(
                    &self.system_calls,
                    "of this process, tracepoint sys_enter",
                    untraced,
                ),
            ),
            kind("context switches", "of this process, getrusage"),
            kind(
                "TLB flushes of other CPUs",
                or(
                    &self.flushes,
                    "sent by this process, tracepoint tlb_flush",
                    "received on the whole machine, line TLB of /proc/interrupts",
                ),
            ),
            kind(
                "interrupts that wake a CPU",
                "on the whole machine, line RES of /proc/interrupts",
            ),
        ]
    }

    /// The figures now; `None` for what cannot be had here.
    #[must_use]
    pub fn read(&self) -> [Option<u64>; Self::NR] {
        // SAFETY: an rusage is integers: zero is a value.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: `usage` is valid for the call.
        unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
        let count = |tracepoint: &Option<Tracepoint>| tracepoint.as_ref().map(Tracepoint::read);
        [
            count(&self.system_calls),
            Some((usage.ru_nvcsw + usage.ru_nivcsw).unsigned_abs()),
            // Without CAL, whose line has counted these interrupts once more since 2016 (`arch_show_interrupts` in
            // arch/x86/kernel/irq.c prints `irq_call_count`, from which `irq_tlb_count` was subtracted before).
            count(&self.flushes).or_else(|| interrupts("TLB:")),
            interrupts("RES:"),
        ]
    }
}

/// Interrupts of this line of /proc/interrupts, on all CPUs together; `None` where there is no such line.
fn interrupts(name: &str) -> Option<u64> {
    let table = std::fs::read_to_string("/proc/interrupts").ok()?;
    let mut lines = table.lines().map(str::trim_start);
    let line = lines.find_map(|line| line.strip_prefix(name))?;
    let of_cpus = line
        .split_whitespace()
        .map_while(|word| word.parse::<u64>().ok());
    Some(of_cpus.sum())
}

/// How often a place in the kernel was passed by threads of this process: where tracefs is mounted, and perf events are permitted.
#[derive(Debug)]
struct Tracepoint(Vec<File>);

impl Tracepoint {
    fn open(name: &str, filter: Option<&CStr>) -> Option<Self> {
        let dirs = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
        let id = |dir| std::fs::read_to_string(format!("{dir}/events/{name}/id")).ok();
        let id: u64 = dirs.into_iter().find_map(id)?.trim().parse().ok()?;
        let tasks = std::fs::read_dir("/proc/self/task").ok()?;
        let tids = tasks
            .flatten()
            .filter_map(|task| task.file_name().to_str()?.parse().ok());
        let files = tids.map(|tid| Self::of_thread(id, tid, filter));
        files.collect::<Option<_>>().map(Self)
    }

    fn of_thread(id: u64, tid: libc::pid_t, filter: Option<&CStr>) -> Option<File> {
        const TRACEPOINT: u64 = 2;
        const CLOEXEC: libc::c_ulong = 8;
        const SET_FILTER: u64 = 0x4008_2406;
        // The oldest `struct perf_event_attr`: its type and size, and what of that type.
        let mut attr = [0_u64; 8];
        attr[0] = TRACEPOINT | (size_of_val(&attr) as u64) << 32;
        attr[1] = id;
        // SAFETY: reads the structure, whose size it says.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                attr.as_ptr(),
                tid,
                -1,
                -1,
                CLOEXEC,
            )
        };
        let fd = i32::try_from(fd).ok().filter(|&fd| fd >= 0)?;
        // SAFETY: a descriptor just made, which nobody else knows.
        let file = unsafe { File::from_raw_fd(fd) };
        if let Some(filter) = filter {
            // SAFETY: reads a string.
            let set = unsafe { libc::ioctl(fd, SET_FILTER as libc::Ioctl, filter.as_ptr()) };
            if set != 0 {
                return None;
            }
        }
        Some(file)
    }

    fn read(&self) -> u64 {
        let count = |mut file: &File| {
            let mut bytes = [0; 8];
            file.read_exact(&mut bytes)
                .map_or(0, |()| u64::from_ne_bytes(bytes))
        };
        self.0.iter().map(count).sum()
    }
}

/// What else runs while a case is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Setting {
    /// No other thread of this process.
    Quiet,
    /// One thread computes on the other CPU, as a device's worker does, on memory of its own: flushes of the translation cache interrupt
    /// it.
    Busy,
}

impl Setting {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Quiet => "quiet",
            Self::Busy => "busy",
        }
    }
}

/// A thread that computes on one CPU until it is dropped: a loop over ordinary memory of its own, which nobody mirrors. It uses the
/// memory's bandwidth, the caches and the translation cache as a device's kernel does, and asks nothing of the runtime, so that ours
/// and the floors have the same company.
#[derive(Debug)]
pub struct Company {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Company {
    /// Starts it where `setting` asks for it. When this returns it has all its memory, and computes.
    #[must_use]
    pub fn for_setting(setting: Setting, cpu: usize) -> Option<Self> {
        (setting == Setting::Busy).then(|| {
            let stop = Arc::new(AtomicBool::new(false));
            let seen = stop.clone();
            let ready = Arc::new(Barrier::new(2));
            let at_work = ready.clone();
            let thread = std::thread::spawn(move || {
                pin_to_cpu(cpu);
                keep_busy(&at_work, &seen);
            });
            ready.wait();
            Self {
                stop,
                thread: Some(thread),
            }
        })
    }
}

/// A triad, over and over: 6 MiB, so that it is more than a core's own caches.
fn keep_busy(ready: &Barrier, stop: &AtomicBool) {
    const LEN: usize = 1 << 18;
    /// Elements between two looks whether it is to stop.
    const PIECE: usize = 1 << 12;
    let (mut a, b, c) = (vec![1.0_f64; LEN], vec![2.0_f64; LEN], vec![3.0_f64; LEN]);
    ready.wait();
    let pieces = (0..LEN).step_by(PIECE).cycle();
    for at in pieces {
        // Relaxed: it orders nothing.
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let piece = at..at + PIECE;
        let sources = b[piece.clone()].iter().zip(&c[piece.clone()]);
        for (a, (b, c)) in a[piece].iter_mut().zip(sources) {
            *a = b + 0.5 * c;
        }
        black_box(&mut a);
    }
}

impl Drop for Company {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
