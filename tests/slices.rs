//! Every kind of slice, through both doors and with every granule, on a device that copies and on one that computes.

use std::fmt::Debug;

use accel_sim::{Accelerator, indices};
use bytemuck::{Pod, Zeroable};
use svm::{Buffer, Delivery, Granule, Options};
use tests::{TestDevice, Watchdog, usable};

const PAGE: usize = 4096;

/// Runs `test` for each way to mirror.
fn every_way(name: &'static str, test: impl Fn(&Devices, &Options)) {
    let _watchdog = Watchdog::new(name);
    if !usable() {
        return;
    }
    let devices = Devices {
        copying: TestDevice::new().unwrap(),
        computing: Accelerator::with_options(accel_sim::Options::new().workers(2)).unwrap(),
    };
    for delivery in [Delivery::Inline, Delivery::Thread] {
        for granule in [Granule::Page, Granule::Big, Granule::Huge] {
            for read_mostly in [false, true] {
                // What is disabled makes a difference to how pages move, not to how many at once.
                if granule != Granule::Big
                    && (read_mostly || std::env::var_os("SVM_DISABLE").is_some())
                {
                    continue;
                }
                test(
                    &devices,
                    &Options::new()
                        .delivery(delivery)
                        .granule(granule)
                        .read_mostly(read_mostly),
                );
            }
        }
    }
}

struct Devices {
    copying: TestDevice,
    computing: Accelerator,
}

/// An element that is made from a number, and is different for each.
trait Element: Pod + PartialEq + Debug + Send + Sync {
    fn new(n: usize) -> Self;
}

macro_rules! elements {
    ($($name:ident $inner:ty: $new:expr;)*) => { $(
        #[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
        #[repr(C)]
        struct $name($inner);

        impl Element for $name {
            fn new(n: usize) -> Self {
                Self($new(n))
            }
        }
    )* };
}

elements! {
    Byte u8: |n: usize| (n ^ n >> 8) as u8;
    Twelve [u32; 3]: |n: usize| [n as u32, !n as u32, n as u32 * 7];
    TwentyFour [u64; 3]: |n: usize| [n as u64, !n as u64, n as u64 * 7];
    Forty [u64; 5]: |n: usize| [n as u64, !n as u64, n as u64 * 7, 3, n as u64 ^ 5];
    Page [u64; 512]: |n: usize| [n as u64 + 1; 512];
    Large [[u64; 23]; 64]: |n: usize| [[n as u64 + 1; 23]; 64];
}

impl Element for u64 {
    fn new(n: usize) -> Self {
        n as u64 * 3 + 1
    }
}

fn fill<T: Element>(slice: &mut [T], from: usize) {
    for (i, x) in slice.iter_mut().enumerate() {
        *x = T::new(from + i);
    }
}

#[track_caller]
fn check<T: Element>(slice: &[T], from: usize) {
    if let Some(i) = slice
        .iter()
        .enumerate()
        .position(|(i, x)| *x != T::new(from + i))
    {
        panic!(
            "element {i} of {}: {:?}, not {:?}",
            slice.len(),
            slice[i],
            T::new(from + i)
        );
    }
}

fn made<T: Element>(len: usize, from: usize) -> Vec<T> {
    (from..from + len).map(T::new).collect()
}

/// What is done with a view: read and written by the device that copies, then by chunks, elements and pointers.
macro_rules! exercise {
    ($type:ty, $devices:expr, $mirror:expr) => {{
        let (devices, mirror) = ($devices, $mirror);
        let len = mirror.len();
        fill(mirror.as_mut_slice(), 0);
        let mut out = made::<$type>(len, 77);
        let view = mirror.view();
        devices
            .copying
            .read(
                view.region(),
                view.addr(),
                bytemuck::cast_slice_mut(&mut out),
            )
            .unwrap();
        check(&out, 0);
        check(mirror.as_slice(), 0);
        let view = mirror.view_mut();
        devices
            .copying
            .write(
                view.region(),
                view.addr(),
                bytemuck::cast_slice(&made::<$type>(len, 1)),
            )
            .unwrap();
        // From one device's memory to the other's.
        devices
            .computing
            .run((indices(), mirror.view()), |(range, chunk)| {
                check(chunk, range.start + 1)
            })
            .unwrap();
        devices
            .computing
            .run((indices(), mirror.view_mut()), |(range, chunk)| {
                fill(chunk, range.start + 2)
            })
            .unwrap();
        check(mirror.as_slice(), 2);
        devices
            .computing
            .run_items(len, mirror.view_mut(), |_lane, i, x| {
                check(&[x.load(i)?], i + 2);
                x.store(i, Element::new(i + 3))
            })
            .unwrap();
        check(mirror.as_slice(), 3);
        fill(mirror.as_mut_slice(), 4);
        devices
            .computing
            .run_items(len, mirror.view_mut(), |lane, i, x| {
                let ptr = x.ptr(i);
                check(&[lane.load(ptr)?], i + 4);
                lane.store(ptr, Element::new(i + 5))
            })
            .unwrap();
    }};
}

/// Mirrors a slice, and looks that nothing but the slice has changed.
fn exercise_slice<T: Element>(
    devices: &Devices,
    options: &Options,
    memory: &mut [T],
    range: std::ops::Range<usize>,
) {
    fill(memory, 1000);
    {
        let mut mirror = svm::mirror_with(&mut memory[range.clone()], options).unwrap();
        exercise!(T, devices, &mut mirror);
        assert_eq!(mirror.stats().anomalies, 0);
        mirror.close().unwrap();
    }
    check(&memory[range.clone()], 5);
    check(&memory[..range.start], 1000);
    check(&memory[range.end..], 1000 + range.end);
    let slice = &memory[range];
    let input = svm::mirror_ref_with(slice, options).unwrap();
    let mut out = made::<T>(slice.len(), 77);
    let view = input.view();
    devices
        .copying
        .read(
            view.region(),
            view.addr(),
            bytemuck::cast_slice_mut(&mut out),
        )
        .unwrap();
    check(&out, 5);
    devices
        .computing
        .run((indices(), input.view()), |(range, chunk)| {
            check(chunk, range.start + 5);
        })
        .unwrap();
    devices
        .computing
        .run_items(slice.len(), input.view(), |_lane, i, x| {
            x.load(i).map(|x| check(&[x], i + 5))
        })
        .unwrap();
    assert_eq!(input.stats().anomalies, 0);
    input.close().unwrap();
}

#[test]
fn vectors_and_boxes() {
    every_way("vectors and boxes", |devices, options| {
        for len in [0, 1, 511, 512, 513, 5000, 70_000] {
            exercise_slice::<u64>(devices, options, &mut made(len, 0), 0..len);
        }
        let mut boxed: Box<[u64]> = made(20_000, 0).into();
        exercise_slice(devices, options, &mut boxed, 0..20_000);
    });
}

#[test]
fn sub_slices_at_odd_offsets() {
    every_way("sub-slices", |devices, options| {
        let mut bytes: Vec<Byte> = made(12 * PAGE, 0);
        for range in [
            3..4,
            5..5,
            1..PAGE,
            77..9 * PAGE + 5,
            4095..8193,
            4096..12288,
            100..12 * PAGE - 1,
        ] {
            exercise_slice(devices, options, &mut bytes, range);
        }
    });
}

#[test]
fn page_aligned_and_below_a_page() {
    every_way("aligned", |devices, options| {
        let mut words: Vec<u64> = made(20 * 512, 0);
        // The first page border inside, wherever the allocator has put it.
        let start = (&raw const words[0]).addr();
        let shift = (start.next_multiple_of(PAGE) - start) / 8;
        for range in [
            shift..shift + 512,
            shift..shift + 5 * 512,
            shift..shift + 511,
            shift + 1..shift + 512,
            shift + 500..shift + 530,
        ] {
            exercise_slice(devices, options, &mut words, range);
        }
        exercise_slice::<Page>(devices, options, &mut made(20, 0), 1..19);
    });
}

#[test]
fn elements_that_straddle_pages_and_edges() {
    every_way("straddling", |devices, options| {
        exercise_slice::<Twelve>(devices, options, &mut made(9000, 0), 7..8991);
        exercise_slice::<TwentyFour>(devices, options, &mut made(5000, 0), 1..4999);
        exercise_slice::<Forty>(devices, options, &mut made(4000, 0), 3..3990);
        exercise_slice::<Page>(devices, options, &mut made(12, 0), 1..11);
        exercise_slice::<Large>(devices, options, &mut made(9, 0), 1..8);
        // A single element, in one page or across two.
        let mut few: Vec<Forty> = made(210, 0);
        for i in [0, 99, 100, 101, 102, 103] {
            exercise_slice(devices, options, &mut few, i..i + 1);
        }
    });
}

#[test]
fn buffers() {
    every_way("buffers", |devices, options| {
        macro_rules! buffer {
            ($type:ty, $len:expr) => {
                let mut buffer = Buffer::<$type>::with_options($len, options).unwrap();
                assert!(buffer.as_slice().iter().all(|x| *x == Zeroable::zeroed()));
                exercise!($type, devices, &mut buffer);
                check(buffer.as_slice(), 5);
                assert_eq!(buffer.stats().anomalies, 0);
            };
        }
        buffer!(Byte, 1);
        buffer!(u64, 0);
        buffer!(u64, 513);
        buffer!(u64, 270_000);
        buffer!(Twelve, 7001);
        buffer!(Forty, 9_000);
    });
}

#[test]
fn arrays_on_the_stack() {
    every_way("stack", |devices, options| {
        let mut array = [0u64; 9 * 512];
        exercise_slice(devices, options, &mut array, 0..9 * 512);
        exercise_slice(devices, options, &mut array, 1..1000);
        // Mirrored by another thread, which does not know whose stack it is.
        std::thread::scope(|scope| {
            scope.spawn(|| exercise_slice(devices, options, &mut array, 3..9 * 512));
        });
    });
}

#[test]
fn statics() {
    static mut DATA: [u64; 20 * 512] = [7; 20 * 512];
    static mut BSS: [u64; 20 * 512] = [0; 20 * 512];
    let (data, bss) = (&raw mut DATA, &raw mut BSS);
    every_way("statics", |devices, options| {
        // SAFETY: this closure alone uses them, one call after the other.
        let data = unsafe { data.as_mut_unchecked() };
        // SAFETY: as above.
        let bss = unsafe { bss.as_mut_unchecked() };
        for memory in [data, bss] {
            exercise_slice(devices, options, memory, 0..20 * 512);
            exercise_slice(devices, options, memory, 5..9000);
        }
    });
}

/// An anonymous mapping without swap reserved for it.
fn map(bytes: usize) -> *mut u8 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh mapping.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            -1,
            0,
        )
    };
    assert_ne!(at, libc::MAP_FAILED);
    at.cast()
}

#[test]
fn gigabytes_that_are_hardly_used() {
    const BYTES: usize = 6 << 30;
    every_way("gigabytes", |devices, options| {
        let start = map(BYTES);
        // SAFETY: the mapping stays until the mirror is closed.
        let mut mirror = unsafe { svm::mirror_raw(start, BYTES, options) }.unwrap();
        let places: Vec<usize> = (0..40)
            .map(|i| (i + 1_usize).wrapping_mul(0x9E37_79B9_7F4A_7C15) % (BYTES - 8))
            .collect();
        for (i, &place) in places.iter().enumerate() {
            let view = mirror.view_mut();
            let byte = i as u8 + 1;
            match i % 3 {
                0 => devices
                    .copying
                    .write(view.region(), view.addr() + place, &[byte])
                    .unwrap(),
                1 => mirror.as_mut_slice()[place] = byte,
                _ => devices
                    .computing
                    .run_items(1, view, |_lane, _i, bytes| bytes.store(place, byte))
                    .unwrap(),
            }
        }
        for (i, &place) in places.iter().enumerate() {
            assert_eq!(mirror.as_slice()[place], i as u8 + 1);
            let view = mirror.view();
            let mut out = [0; 2];
            devices
                .copying
                .read(view.region(), view.addr() + place, &mut out[..1])
                .unwrap();
            assert_eq!(out[0], i as u8 + 1);
            devices
                .computing
                .run_items(1, mirror.view(), |_lane, _i, x| {
                    x.load(place).map(|x| assert_eq!(x, i as u8 + 1))
                })
                .unwrap();
        }
        assert_eq!(mirror.stats().anomalies, 0);
        mirror.close().unwrap();
        // SAFETY: nobody uses it any more.
        let outcome = unsafe { libc::munmap(start.cast(), BYTES) };
        assert_eq!(outcome, 0);
    });
}

#[test]
fn memory_that_cannot_move_is_used_where_it_is() {
    every_way("in place", |devices, options| {
        let len = 10 * PAGE;
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"slices".as_ptr(), libc::MFD_CLOEXEC) };
        // SAFETY: the descriptor is ours.
        let outcome = unsafe { libc::ftruncate(fd, len as i64) };
        assert_eq!(outcome, 0);
        for sharing in [libc::MAP_SHARED, libc::MAP_PRIVATE] {
            // SAFETY: a fresh mapping of our own file.
            let at = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    sharing,
                    fd,
                    0,
                )
            };
            assert_ne!(at, libc::MAP_FAILED);
            // SAFETY: the mapping is ours alone, of plain words, and stays until the end of the loop.
            let words = unsafe { std::slice::from_raw_parts_mut(at.cast::<u64>(), len / 8) };
            assert!(svm::mirror_with(words, options).unwrap().is_in_place());
            exercise_slice(devices, options, words, 0..len / 8);
            exercise_slice(devices, options, words, 3..2000);
            // SAFETY: nobody uses it any more.
            unsafe { libc::munmap(at, len) };
        }
        // SAFETY: the descriptor is ours.
        unsafe { libc::close(fd) };
    });
}

/// All of the above without MOVE, and without what else a kernel or a container may lack.
#[test]
fn all_of_it_without() {
    let _watchdog =
        Watchdog::with_timeout("all of it without", std::time::Duration::from_secs(280));
    if !usable() || std::env::var_os("SVM_DISABLE").is_some() {
        return;
    }
    for disabled in [
        "move",
        "pagemap_scan,procmap_query,membarrier,process_vm,events",
    ] {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        let output = command
            .args(["--skip", "all_of_it_without"])
            .env("SVM_DISABLE", disabled)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success(),
            "without {disabled}: {}\n{text}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
