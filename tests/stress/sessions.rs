//! Sessions: mirrors of one thread's own memory, worked on from both sides, beside a shadow copy in plain memory.

use std::fmt;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Mutex;

use accel_sim::indices;
use bytemuck::{Pod, Zeroable};
use svm::{Buffer, Mirror, View, ViewMut};

use super::{Checked, KINDS, PAGE, Run, error};
use crate::rng::{Rng, mix};

/// An element of a session's memory.
pub(super) trait Element: Pod + PartialEq + fmt::Debug + Send + Sync {
    fn new(seed: u64) -> Self;
    fn step(self, by: u64) -> Self;
}

#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(transparent)]
pub(super) struct Word(u64);

#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Twelve([u32; 3]);

#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Forty([u64; 5]);

impl Element for Word {
    fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    fn step(self, by: u64) -> Self {
        Self(self.0.wrapping_mul(3).wrapping_add(by))
    }
}

impl Element for Twelve {
    fn new(seed: u64) -> Self {
        Self([0, 1, 2].map(|i| mix(seed ^ i << 40) as u32))
    }

    fn step(self, by: u64) -> Self {
        Self(self.0.map(|x| x.wrapping_mul(3).wrapping_add(by as u32)))
    }
}

impl Element for Forty {
    fn new(seed: u64) -> Self {
        Self([0, 1, 2, 3, 4].map(|i| mix(seed ^ i << 40)))
    }

    fn step(self, by: u64) -> Self {
        Self(self.0.map(|x| x.wrapping_mul(3).wrapping_add(by)))
    }
}

/// What a `Mirror` and a `Buffer` have in common.
trait Mirrored<T: Pod> {
    fn view(&self) -> View<'_, T>;
    fn view_mut(&mut self) -> ViewMut<'_, T>;
    fn as_slice(&self) -> &[T];
    fn as_mut_slice(&mut self) -> &mut [T];
    fn pin(&self, range: std::ops::Range<usize>) -> svm::Result<svm::Pin<'_>>;
    fn advise_read_mostly(&self, yes: bool);
}

macro_rules! mirrored {
    ($($type:ty),*) => { $(
        impl<T: Pod> Mirrored<T> for $type {
            fn view(&self) -> View<'_, T> { self.view() }
            fn view_mut(&mut self) -> ViewMut<'_, T> { self.view_mut() }
            fn as_slice(&self) -> &[T] { self.as_slice() }
            fn as_mut_slice(&mut self) -> &mut [T] { self.as_mut_slice() }
            fn pin(&self, range: std::ops::Range<usize>) -> svm::Result<svm::Pin<'_>> { self.pin(range) }
            fn advise_read_mostly(&self, yes: bool) { self.advise_read_mostly(yes); }
        }
    )* };
}

mirrored!(Mirror<'_, T>, Buffer<T>);

/// Mirrors memory of its own again and again, and works on it from both sides.
pub(super) fn sessions<T: Element>(run: &Run, mut rng: Rng) -> Checked {
    let size = size_of::<T>();
    let mut memory: Vec<T> = (0..(5 << 20) / size).map(|i| T::new(i as u64)).collect();
    while run.goes_on() {
        // Below a page, some pages, a good part of a block, more than one block.
        let bytes = [PAGE / 2, 3 * PAGE, 40 * PAGE, 1 << 20, 3 << 20][rng.below(5)];
        let len = rng.below(bytes / size) + 1;
        let start = rng.below(memory.len() - len);
        if rng.below(2) == 0 {
            let mut shadow = memory[start..start + len].to_vec();
            let around = (
                memory[..start].last().copied(),
                memory.get(start + len).copied(),
            );
            let mut mirror = svm::mirror_with(&mut memory[start..start + len], &run.options)
                .map_err(|e| e.to_string())?;
            session(run, &mut rng, &mut mirror, &mut shadow)?;
            run.absorb(mirror.stats());
            mirror.close().map_err(|e| e.to_string())?;
            same("at home", &memory[start..start + len], &shadow, 0)?;
            let now = (
                memory[..start].last().copied(),
                memory.get(start + len).copied(),
            );
            if now != around {
                return Err("a neighbour of the slice has changed".into());
            }
        } else {
            let mut buffer = Buffer::with_options(len, &run.options).map_err(|e| e.to_string())?;
            let mut shadow = vec![T::zeroed(); len];
            session(run, &mut rng, &mut buffer, &mut shadow)?;
            run.absorb(buffer.stats());
        }
        run.count(KINDS[13], 1);
    }
    Ok(())
}

fn same<T: Element>(what: &str, found: &[T], wanted: &[T], first: usize) -> Checked {
    match found.iter().zip(wanted).position(|(f, w)| f != w) {
        None => Ok(()),
        Some(i) => {
            let wrong = found.iter().zip(wanted).filter(|(f, w)| f != w).count();
            let at = (&raw const found[i]).addr();
            Err(format!(
                "{what}: element {} ({at:#x}) is {:x?}, not {:x?}; {wrong} of {} differ",
                first + i,
                found[i],
                wanted[i],
                found.len()
            ))
        }
    }
}

fn session<T: Element>(
    run: &Run,
    rng: &mut Rng,
    memory: &mut impl Mirrored<T>,
    shadow: &mut [T],
) -> Checked {
    let len = shadow.len();
    for _ in 0..2 + rng.below(30) {
        if !run.goes_on() {
            return Ok(());
        }
        let accel = run.accel(rng);
        let from = rng.below(len);
        let range = from..from + 1 + rng.below(len - from);
        let by = rng.next();
        match rng.below(14) {
            0 | 1 => {
                accel
                    .run(memory.view_mut(), |chunk| {
                        chunk.iter_mut().for_each(|x| *x = x.step(by));
                    })
                    .map_err(error("chunk kernel, writing"))?;
                shadow.iter_mut().for_each(|x| *x = x.step(by));
                run.count(KINDS[4], 1);
            }
            2 => {
                let wrong = Mutex::new(Ok(()));
                let wanted = &*shadow;
                accel
                    .run((indices(), memory.view()), |(i, chunk)| {
                        if let Err(what) = same("in a chunk", chunk, &wanted[i.clone()], i.start) {
                            *wrong.lock().expect("no panic while it is held") = Err(what);
                        }
                    })
                    .map_err(error("chunk kernel, reading"))?;
                wrong.into_inner().expect("no panic while it is held")?;
                run.count(KINDS[5], 1);
            }
            3 | 4 => {
                let stride = 1 + rng.below(200);
                accel
                    .run_items(
                        len.div_ceil(stride),
                        memory.view_mut(),
                        |_lane, i, elements| {
                            let x = elements.load(i * stride)?;
                            elements.store(i * stride, x.step(by))
                        },
                    )
                    .map_err(error("element kernel"))?;
                shadow
                    .iter_mut()
                    .step_by(stride)
                    .for_each(|x| *x = x.step(by));
                run.count(KINDS[6], 1);
            }
            5 => {
                let wrong = Mutex::new(Ok(()));
                let wanted = &*shadow;
                let on_cpu = memory.as_slice();
                accel
                    .scope(|scope| {
                        let launch = scope.launch((indices(), memory.view()), |(i, chunk)| {
                            // The kernel reads the same memory as a CPU too (hazards W1).
                            let mirrored = &on_cpu[i.clone()];
                            let checked = same("in a chunk", chunk, &wanted[i.clone()], i.start)
                                .and_then(|()| {
                                    same(
                                        "on the worker's CPU",
                                        mirrored,
                                        &wanted[i.clone()],
                                        i.start,
                                    )
                                });
                            if let Err(what) = checked {
                                *wrong.lock().expect("no panic while it is held") = Err(what);
                            }
                        })?;
                        let here = same(
                            "beside a launch",
                            &on_cpu[range.clone()],
                            &wanted[range.clone()],
                            range.start,
                        );
                        if let Err(what) = here {
                            *wrong.lock().expect("no panic while it is held") = Err(what);
                        }
                        launch.wait()
                    })
                    .map_err(error("launch beside CPU reads"))?;
                wrong.into_inner().expect("no panic while it is held")?;
                run.count(KINDS[7], 1);
            }
            6 | 7 => {
                same(
                    "on the CPU",
                    &memory.as_slice()[range.clone()],
                    &shadow[range.clone()],
                    range.start,
                )?;
                run.count(KINDS[8], 1);
            }
            8 | 9 => {
                for (i, x) in memory.as_mut_slice()[range.clone()].iter_mut().enumerate() {
                    *x = T::new(by ^ i as u64);
                }
                shadow[range]
                    .iter_mut()
                    .enumerate()
                    .for_each(|(i, x)| *x = T::new(by ^ i as u64));
                run.count(KINDS[9], 1);
            }
            10 => {
                let zero = std::fs::File::open("/dev/zero").map_err(|e| e.to_string())?;
                let target = memory.as_mut_slice()[range.clone()].as_mut_ptr();
                let pin = memory.pin(range.clone()).map_err(|e| e.to_string())?;
                let bytes = range.len() * size_of::<T>();
                // SAFETY: the range is inside the mirror, which is exclusively ours, and pinned.
                let n = unsafe { libc::read(zero.as_raw_fd(), target.cast(), bytes) };
                if usize::try_from(n) != Ok(bytes) {
                    return Err(format!(
                        "read(2) of {bytes} pinned bytes: {n}, {}",
                        std::io::Error::last_os_error()
                    ));
                }
                drop(pin);
                shadow[range].fill(T::zeroed());
                run.count(KINDS[10], 1);
            }
            11 => {
                let wanted: &[u8] = bytemuck::cast_slice(&shadow[range.clone()]);
                let found = accel
                    .scope(|scope| {
                        let launch = scope.launch(memory.view(), |chunk| {
                            std::hint::black_box(chunk);
                        })?;
                        let found = written(&*memory, range.clone());
                        launch.wait()?;
                        Ok(found)
                    })
                    .map_err(error("launch beside a pin"))??;
                if found != wanted {
                    return Err("write(2) of pinned memory wrote something else".into());
                }
                run.count(KINDS[11], 1);
            }
            12 => {
                accel.release().map_err(error("release"))?;
                run.count(KINDS[12], 1);
            }
            _ => memory.advise_read_mostly(rng.below(2) == 0),
        }
    }
    same("at the end of a session", memory.as_slice(), shadow, 0)
}

/// The bytes of `range`, as a system call sees them while they are pinned.
fn written<T: Pod>(
    memory: &impl Mirrored<T>,
    range: std::ops::Range<usize>,
) -> Result<Vec<u8>, String> {
    // SAFETY: the name is a C string; a new descriptor, or -1.
    let fd = unsafe { libc::memfd_create(c"stress".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error().to_string());
    }
    // SAFETY: the descriptor is new, and nobody else's.
    let file = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let source: &[u8] = bytemuck::cast_slice(&memory.as_slice()[range.clone()]);
    let pin = memory.pin(range).map_err(|e| e.to_string())?;
    let mut out = vec![0; source.len()];
    // SAFETY: the source is a slice, and pinned.
    let n = unsafe { libc::write(file.as_raw_fd(), source.as_ptr().cast(), source.len()) };
    if usize::try_from(n) != Ok(source.len()) {
        return Err(format!(
            "write(2) of {} pinned bytes: {n}, {}",
            source.len(),
            std::io::Error::last_os_error()
        ));
    }
    drop(pin);
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut out, 0).map_err(|e| e.to_string())?;
    Ok(out)
}
