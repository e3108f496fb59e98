//! E: edges, the parts of pages at either end of a mirror.

use svm::{Access, ErrorKind};
use tests::Map;
use tests::idle::{Idle, fault_in};
use tests::mapping::READ_WRITE;

use crate::PAGE;
use crate::fixture::both_doors;

/// E1: an edge gets no event. A launch over one that has been unmapped is told so, when it begins or when it ends, and the mirror's body
/// goes on.
#[test]
fn an_edge_whose_mapping_has_gone_is_a_typed_error() {
    both_doors("edge unmapped", |options| {
        for gone_first in [true, false] {
            let map = Map::new(4);
            // SAFETY: the test's mapping, of which it unmaps the page with the edge.
            let mirror =
                unsafe { svm::mirror_raw(map.at(0).add(100), 4 * PAGE - 100, options) }.unwrap();
            let device = Idle::attach().unwrap();
            let mapped = device.map(mirror.view().region()).unwrap();
            // SAFETY: as above.
            let unmap = || assert_eq!(unsafe { libc::munmap(map.at(0).cast(), PAGE) }, 0);
            if gone_first {
                unmap();
            } else {
                // SAFETY: that the memory does not stay is what is tried; nothing else uses it.
                let begun = unsafe { mapped.begin_use(Access::Write) }.unwrap();
                unmap();
                let ended = begun.finish().unwrap_err();
                assert!(matches!(ended.kind(), ErrorKind::Unmapped), "{ended}");
            }
            // SAFETY: as above.
            let refused = unsafe { mapped.begin_use(Access::Write) }
                .map(drop)
                .unwrap_err();
            assert!(matches!(refused.kind(), ErrorKind::Unmapped), "{refused}");
            // Memory of somebody else's there is not written by a launch that began before.
            let mut range = device.range().unwrap();
            let page = (map.addr + PAGE - mapped.region().base()) / PAGE;
            fault_in(&mut range, &mapped, page..page + 3, Access::Write).unwrap();
            assert_eq!(map.read(1), 2);
            drop(range);
            mirror.close().unwrap();
            let _ = Map::at_hint(map.addr, 1, READ_WRITE, libc::MAP_FIXED_NOREPLACE);
            map.unmap();
        }
    });
}
