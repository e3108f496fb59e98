//! Pages that are parted from a child's before a device has them.

use std::io::{Read, Write};

use svm::Access;
use tests::{Map, TestDevice};

use crate::PAGE;
use crate::fixture::{each_alone, filled, spawn_child, wait_for};

/// While one device's fault breaks the sharing of pages with a child, the others wait: memory that nobody has pinned may be unmapped at any
/// moment, and a translation in place would lead nowhere before anybody has heard of it.
#[test]
fn sharing_is_broken_with_no_device_in_place() {
    each_alone(
        "sharing::sharing_is_broken_with_no_device_in_place",
        "broken sharing",
        |options| {
            let buffer = filled(options);
            let devices = [TestDevice::new().unwrap(), TestDevice::new().unwrap()];
            for _ in 0..4 {
                // It has the pages, too, until it is told to go.
                let (mut here, there) = std::os::unix::net::UnixStream::pair().unwrap();
                let child = spawn_child(|| {
                    let mut there = there;
                    there.read(&mut [0]).is_ok()
                });
                let view = buffer.view();
                let (region, addr) = (view.region(), view.addr());
                std::thread::scope(|scope| {
                    for device in &devices {
                        scope.spawn(move || {
                            for page in 0..32 {
                                device
                                    .fault_in(region, addr + page * PAGE, 1, Access::Read)
                                    .unwrap();
                            }
                        });
                    }
                });
                here.write_all(&[1]).unwrap();
                assert_eq!(wait_for(child), 0);
            }
            assert_eq!(buffer.stats().in_place_pages, 0, "{options:?}");
            assert!(buffer.as_slice().iter().zip(0..).all(|(&x, i)| x == i));
        },
    );
}

/// A page that has gone keeps nothing else from being parted from a child: in place the others would be in a bare `munmap`'s way.
#[test]
fn sharing_is_broken_beside_a_page_that_is_gone() {
    each_alone(
        "sharing::sharing_is_broken_beside_a_page_that_is_gone",
        "gone beside",
        |options| {
            let map = Map::new(32);
            let mut mirror = map.mirror(options);
            let device = TestDevice::new().unwrap();
            let (mut here, there) = std::os::unix::net::UnixStream::pair().unwrap();
            // Of the same mapping still, but not the mirror's: what was there has moved.
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
            // SAFETY: a page of the test's.
            let moved = unsafe { libc::mremap(map.at(5).cast(), PAGE, PAGE, flags, 0_usize) };
            assert_ne!(moved, libc::MAP_FAILED);
            let child = spawn_child(|| {
                let mut there = there;
                there.read(&mut [0]).is_ok()
            });
            let view = mirror.view_mut();
            for page in [4, 6] {
                device
                    .fault_in(view.region(), map.at(page).addr(), 1, Access::Write)
                    .unwrap();
            }
            here.write_all(&[1]).unwrap();
            assert_eq!(wait_for(child), 0);
            assert_eq!(mirror.stats().in_place_pages, 0, "{options:?}");
            mirror.close().unwrap();
            assert_eq!([4, 6].map(|page| map.read(page)), [5, 7]);
        },
    );
}
