//! A device that maps pages before it translates to them: what it made for an update that came to nothing is undone.

use std::panic::{AssertUnwindSafe, catch_unwind};

use svm::{
    Access, Buffer, DeviceFaultKind, MappedRef, NotMapped, Options, PageMapper, Range, Shared,
};
use tests::idle::{Idle, TIMEOUT};
use tests::{Watchdog, usable};

const PAGE: usize = 4096;
const PAGES: usize = 8;

/// An "IOMMU" that writes down what is asked of it.
#[derive(Default)]
struct Iommu<'a> {
    log: Vec<(char, usize)>,
    /// Called before the mapping with this count is made.
    at: Option<(usize, &'a dyn Fn())>,
    refuses: Option<usize>,
}

impl PageMapper for Iommu<'_> {
    type Mapping = usize;

    fn map(&mut self, page: usize, _: Access) -> Result<usize, DeviceFaultKind> {
        if let Some((count, act)) = self.at
            && count == self.log.len()
        {
            act();
        }
        if self.refuses == Some(self.log.len()) {
            return Err(DeviceFaultKind::OutOfMemory);
        }
        self.log.push(('m', page));
        Ok(page + 1000)
    }

    fn unmap(&mut self, page: usize, mapping: usize) {
        assert_eq!(mapping, page + 1000);
        self.log.push(('u', page));
    }
}

/// One update of all pages of the buffer, ended by mapping them.
fn update(
    range: &mut Range<Idle>,
    mapped: &MappedRef<Idle>,
    iommu: &mut Iommu<'_>,
) -> Result<Vec<(usize, usize)>, NotMapped> {
    let first = first_page(mapped);
    let mut update = range
        .start_update(mapped, first..first + PAGES, TIMEOUT)
        .map_err(NotMapped::Fault)?;
    update.fault(Access::Write).map_err(NotMapped::Fault)?;
    update.end_update_mapped(iommu, |mappings, _| mappings)
}

fn with_buffer(test: impl FnOnce(&Shared<'_, u8>, &MappedRef<Idle>, &mut Range<Idle>)) {
    let _watchdog = Watchdog::new("dma");
    if !usable() {
        return;
    }
    let mut buffer = Buffer::<u8>::with_options(PAGES * PAGE, &Options::new()).unwrap();
    buffer.as_mut_slice().fill(1);
    let idle = Idle::attach().unwrap();
    let shared = buffer.share();
    let mapped = idle.map(shared.view().region()).unwrap();
    test(&shared, &mapped, &mut idle.range().unwrap());
}

fn first_page(mapped: &MappedRef<Idle>) -> usize {
    let region = mapped.region();
    (region.addr() - region.base()) / PAGE
}

/// The same pages mapped and, the last one first, unmapped.
fn undone(first: usize, n: usize) -> Vec<(char, usize)> {
    let made = (first..first + n).map(|page| ('m', page));
    made.chain((first..first + n).rev().map(|page| ('u', page)))
        .collect()
}

#[test]
fn what_was_mapped_is_handed_over_under_the_lock() {
    with_buffer(|_, mapped, range| {
        let first = first_page(mapped);
        let mut iommu = Iommu::default();
        let all: Vec<_> = (first..first + PAGES)
            .map(|page| (page, page + 1000))
            .collect();
        assert_eq!(update(range, mapped, &mut iommu), Ok(all));
        assert!(iommu.log.iter().all(|(what, _)| *what == 'm'));
    });
}

#[test]
fn an_interrupted_update_unmaps_what_it_mapped() {
    with_buffer(|shared, mapped, range| {
        let first = first_page(mapped);
        let touch = || shared.store(5 * PAGE, 9);
        // The CPU takes a page back after the fault, before the last mapping and after it.
        for at in [0, 3, PAGES - 1] {
            let mut iommu = Iommu {
                at: Some((at, &touch)),
                ..Iommu::default()
            };
            assert_eq!(
                update(range, mapped, &mut iommu),
                Err(NotMapped::Interrupted)
            );
            assert_eq!(iommu.log, undone(first, at + 1));
            // Begun again, it succeeds.
            assert!(update(range, mapped, &mut Iommu::default()).is_ok());
        }
    });
}

#[test]
fn a_mapper_that_fails_keeps_nothing() {
    with_buffer(|_, mapped, range| {
        let first = first_page(mapped);
        let mut iommu = Iommu {
            refuses: Some(4),
            ..Iommu::default()
        };
        let Err(NotMapped::Fault(fault)) = update(range, mapped, &mut iommu) else {
            panic!("it was refused");
        };
        assert_eq!(fault.kind, DeviceFaultKind::OutOfMemory);
        assert_eq!(fault.addr / PAGE % 512, (first + 4) % 512);
        assert_eq!(iommu.log, undone(first, 4));
        let mut iommu = Iommu {
            at: Some((4, &|| panic!("a bug of the mapper"))),
            ..Iommu::default()
        };
        assert!(catch_unwind(AssertUnwindSafe(|| update(range, mapped, &mut iommu))).is_err());
        assert_eq!(iommu.log, undone(first, 4));
    });
}
