//! H: huge pages.

use svm::{Access, Granule, Options};
use tests::TestDevice;

use crate::PAGE;
use crate::fixture::both_doors;

/// H1: a huge page stays one on its way to a device, home, and to the device again, whose window has had pages there before.
#[test]
fn a_huge_page_stays_huge_wherever_it_goes() {
    const TRIES: usize = 5;
    both_doors("huge", |options| {
        // The kernel may split a huge page at any time, to compact memory or to look who uses it; but not each time.
        let mut lost = Vec::new();
        for _ in 0..TRIES {
            match moved_as_they_were(options) {
                Ok(()) => return,
                Err(what) => lost.push(what),
            }
        }
        panic!("{lost:?}");
    });
}

/// Moves huge pages to a device and home again, and says when there were fewer of them.
fn moved_as_they_were(options: &Options) -> Result<(), String> {
    const BLOCK_BYTES: usize = 2 << 20;
    let options = options.clone().granule(Granule::Huge).huge_pages(true);
    let mut buffer = svm::Buffer::<u8>::with_options(4 * BLOCK_BYTES, &options).unwrap();
    buffer.as_mut_slice().fill(7);
    let device = TestDevice::new().unwrap();
    let addr = buffer.view().addr();
    let nr_huge = || {
        let pages = svm::snapshot(addr, 4 * BLOCK_BYTES / PAGE).unwrap();
        pages.iter().filter(|page| page.is_huge()).count()
    };
    let at_first = nr_huge();
    if at_first == 0 {
        tests::skip("no huge pages here, or the kernel does not say");
        return Ok(());
    }
    let as_they_were = |what: &str, turn: usize| match nr_huge() {
        now if now == at_first => Ok(()),
        now => Err(format!("{what}, turn {turn}: {now} of {at_first}")),
    };
    for turn in 0..3 {
        let view = buffer.view_mut();
        device
            .fault_in(view.region(), addr, 4 * BLOCK_BYTES, Access::Write)
            .unwrap();
        assert!(buffer.stats().to_device_pages() > 0);
        as_they_were("with the device", turn)?;
        device.release().unwrap();
        as_they_were("home again", turn)?;
    }
    assert!(buffer.as_slice().iter().all(|&byte| byte == 7));
    Ok(())
}
