//! M: moving pages, and what somebody else holds on to.

use svm::{Access, Delivery, Granule};
use tests::{Map, TestDevice};

use crate::PAGE;
use crate::fixture::both_doors;
use crate::ring;

/// M3: the kernel holds on to a page for DMA (a buffer registered with io_uring). It is not copied and dropped: what the kernel
/// writes there later arrives, for the CPU and the device.
#[test]
fn what_the_kernel_writes_to_a_page_it_holds_arrives() {
    both_doors("held for DMA", |options| {
        let map = Map::new(8);
        let Some(ring) = ring::Ring::holding(map.addr + 3 * PAGE, PAGE) else {
            tests::skip("no io_uring here");
            return;
        };
        let mirror = map.mirror(options);
        let device = TestDevice::new().unwrap();
        let region = mirror.view().region();
        for page in 0..8 {
            let second = map.addr + page * PAGE + 8;
            device.write(region, second, &7u64.to_ne_bytes()).unwrap();
        }
        ring.read_into(map.addr + 3 * PAGE, 77);
        let mut words = [0; 16];
        device
            .read(region, map.addr + 3 * PAGE, &mut words)
            .unwrap();
        let (first, second) = words.split_at(8);
        assert_eq!(
            first,
            77u64.to_ne_bytes(),
            "the device has not seen what the kernel wrote"
        );
        assert_eq!(second, 7u64.to_ne_bytes(), "the device's own write is lost");
        assert_eq!(map.read(3), 77, "what the kernel wrote is lost");
        assert!(mirror.stats().in_place_pages > 0, "{:?}", mirror.stats());
        drop(ring);
        mirror.close().unwrap();
        assert_eq!(map.read(3), 77);
        map.unmap();
    });
}

/// A stale window page that somebody has pinned is nobody's contents. It keeps its mirror neither from closing nor from being made anew.
#[test]
fn pinned_stale_frames_keep_no_mirror_from_closing() {
    // Many of both, so that what is discarded again and again would be more than there is room for.
    const NR_PAGES: usize = 512;
    const NR_PINNED: usize = 16;
    both_doors("stale and pinned", |options| {
        let map = Map::new(NR_PAGES);
        let device = TestDevice::new().unwrap();
        for round in 0..2 {
            let mirror = map.mirror(&options.clone().read_mostly(true));
            let view = mirror.view();
            let mut out = vec![0; NR_PAGES * PAGE];
            device.read(view.region(), view.addr(), &mut out).unwrap();
            let offset = device.attachment().map(view.region()).unwrap().offset();
            let frames = map.addr.wrapping_add_signed(offset) + 3 * PAGE;
            let Some(ring) = ring::Ring::holding(frames, NR_PINNED * PAGE) else {
                tests::skip("no io_uring here");
                return;
            };
            // What the device has of them is stale from here on.
            (0..NR_PAGES).for_each(|page| map.write(page, 40 + round));
            mirror.close().unwrap();
            assert!((0..NR_PAGES).all(|page| map.read(page) == 40 + round));
            assert_eq!(device.attachment().resident_bytes(), 0);
            drop(ring);
        }
        map.unmap();
    });
}

/// Of blocks that would come home together one has a frame that the kernel holds for DMA: it comes by a copy, and keeps no other.
#[test]
fn a_pinned_frame_keeps_no_other_block_from_home() {
    const BLOCK: usize = 2 << 20;
    const NR: usize = 5;
    // Together, and each by itself; then no area for stale pages has been made when it turns out that there are some.
    let each = |test: &dyn Fn(&svm::Options)| {
        both_doors("pinned among blocks", |options| {
            for huge in [true, false] {
                test(&options.clone().granule(Granule::Huge).huge_pages(huge));
            }
        });
    };
    each(&|options| {
        let mut buffer = svm::Buffer::<u8>::with_options(NR * BLOCK, options).unwrap();
        let device = TestDevice::new().unwrap();
        let fill = |buffer: &mut svm::Buffer<u8>, with: u8| {
            let pages = buffer.as_mut_slice().chunks_mut(PAGE);
            pages.for_each(|page| page.fill(with));
        };
        for with in [5, 6] {
            fill(&mut buffer, with);
            let view = buffer.view();
            device
                .fault_in(view.region(), view.addr(), NR * BLOCK, Access::Write)
                .unwrap();
            let offset = device.attachment().map(view.region()).unwrap().offset();
            let frames = view.addr().wrapping_add_signed(offset) + 2 * BLOCK + 3 * PAGE;
            let Some(ring) = ring::Ring::holding(frames, PAGE) else {
                tests::skip("no io_uring here");
                return;
            };
            let before = buffer.stats();
            device.release().unwrap();
            let home = buffer.stats() - before;
            assert_eq!(home.to_host_explicit_pages, (NR * BLOCK / PAGE) as u64);
            // What stays is stale, and no more than what is held, which is a huge page's worth where it is one.
            assert!(device.attachment().resident_bytes() <= BLOCK);
            assert!(buffer.as_slice().iter().all(|&byte| byte == with));
            drop(ring);
            // The kernel lets go of it when it gets to that.
            while device.attachment().resident_bytes() > 0 {
                std::thread::yield_now();
                device.release().unwrap();
            }
        }
        assert_eq!(buffer.stats().anomalies, 0);
    });
}

/// What may not be written any more comes home by a copy, and leaves a stale page each: more of them than the area for those has room for.
#[test]
fn more_stale_pages_than_their_area_has_room_for_come_home() {
    const BLOCK: usize = 2 << 20;
    const NR: usize = 10;
    both_doors("many stale pages", |options| {
        let map = Map::new(NR * BLOCK / PAGE);
        (0..NR * BLOCK / PAGE).for_each(|page| map.write(page, 5));
        let mirror = map.mirror(&options.clone().granule(Granule::Huge));
        let device = TestDevice::new().unwrap();
        let region = mirror.view().region();
        device
            .fault_in(region, map.addr, NR * BLOCK, Access::Write)
            .unwrap();
        protect(&map, libc::PROT_READ);
        device.release().unwrap();
        assert_eq!(device.attachment().resident_bytes(), 0);
        assert!((0..NR * BLOCK / PAGE).all(|page| map.read(page) == 5));
        protect(&map, libc::PROT_READ | libc::PROT_WRITE);
        drop(mirror);
        map.unmap();
    });
}

/// Each door has an area for stale pages of its own: of mirrors that come home at once, none's go to another's.
#[test]
fn stale_pages_behind_either_door_go_where_they_belong() {
    both_doors("stale pages of both doors", |options| {
        let others = options.clone().delivery(Delivery::Thread);
        let maps: Vec<Map> = (0..3).map(|_| Map::new(8)).collect();
        let mirrors: Vec<_> = [options, &others, options]
            .into_iter()
            .zip(&maps)
            .map(|(options, map)| {
                (0..8).for_each(|page| map.write(page, 5));
                map.mirror(options)
            })
            .collect();
        let device = TestDevice::new().unwrap();
        for (mirror, map) in mirrors.iter().zip(&maps) {
            device
                .fault_in(mirror.view().region(), map.addr, 8 * PAGE, Access::Write)
                .unwrap();
            // They come by a copy then.
            protect(map, libc::PROT_READ);
        }
        device.release().unwrap();
        assert_eq!(device.attachment().resident_bytes(), 0);
        protect(&maps[2], libc::PROT_READ | libc::PROT_WRITE);
        assert!(
            maps.iter()
                .all(|map| (0..8).all(|page| map.read(page) == 5))
        );
        drop(mirrors);
        maps.into_iter().for_each(Map::unmap);
    });
}

/// By a bare system call, of which the runtime hears nothing.
fn protect(map: &Map, prot: i32) {
    // SAFETY: the test's own mapping, which is written only while it may be.
    let refused = unsafe { libc::mprotect(map.addr as *mut _, map.pages * PAGE, prot) };
    assert_eq!(refused, 0);
}
