//! Unit tests of the table; apart from it, because the models include that file with loom's atomics.

use std::ops::Range;

use crate::shootdown::{Rights, Users};
use crate::sync::AtomicU64;
use crate::table::{Extent, Place, Table, WORD, Words, mask, words};

impl Words for Vec<AtomicU64> {
    fn word(&self, i: usize) -> &AtomicU64 {
        &self[i]
    }
}

fn table(nr_pages: usize, body: Range<usize>) -> Table<Vec<AtomicU64>> {
    let words = || {
        (0..nr_pages.div_ceil(WORD))
            .map(|_| AtomicU64::new(0))
            .collect()
    };
    Table::new(words(), words(), words(), nr_pages, body)
}

#[test]
fn masks_cover_exactly_their_pages() {
    for start in 0..130 {
        for end in start..200 {
            let pages = start..end;
            let covered: Vec<usize> = (0..4 * WORD)
                .filter(|p| mask(p / WORD, &pages) >> (p % WORD) & 1 == 1)
                .collect();
            assert_eq!(covered, pages.clone().collect::<Vec<_>>());
            let touched: Vec<usize> = (0..4).filter(|&i| mask(i, &pages) != 0).collect();
            assert_eq!(touched, words(&pages).collect::<Vec<_>>(), "{pages:?}");
        }
    }
}

#[test]
fn edges_are_always_there_and_the_body_is_not() {
    let t = table(200, 3..197);
    t.clear(&(0..200), Users::All);
    for page in 0..200 {
        let edge = !(3..197).contains(&page);
        assert_eq!(
            t.place(page, Rights::Write),
            edge.then_some(Place::Window),
            "page {page}"
        );
        assert_eq!(
            t.place(page, Rights::Read),
            edge.then_some(Place::Window),
            "page {page}"
        );
    }
    assert_eq!(t.extent(&(0..200), Rights::Read), Err(3));
    assert_eq!(t.nr_missing(&(0..200), Rights::Read), 194);
}

#[test]
fn a_region_without_whole_pages_is_all_edge() {
    let t = table(2, 1..1);
    assert_eq!(t.extent(&(0..2), Rights::Write), Ok(Extent::Window));
}

#[test]
fn an_install_never_touches_an_edge() {
    let t = table(64, 1..63);
    t.install(0, 0, 0, u64::MAX);
    assert_eq!(t.place(0, Rights::Read), Some(Place::Window));
    assert_eq!(t.place(1, Rights::Read), Some(Place::Host));
    assert_eq!(t.extent(&(0..64), Rights::Write), Ok(Extent::Mixed));
    assert_eq!(t.extent(&(1..63), Rights::Write), Ok(Extent::InPlace));
}

#[test]
fn readers_may_stay() {
    let t = table(128, 0..128);
    t.install(1, u64::MAX, u64::MAX, 0);
    t.clear(&(70..80), Users::Writers);
    assert_eq!(t.extent(&(64..128), Rights::Read), Ok(Extent::Window));
    assert_eq!(t.extent(&(64..128), Rights::Write), Err(70));
    assert_eq!(t.nr_missing(&(64..128), Rights::Write), 10);
    t.clear(&(64..128), Users::All);
    assert_eq!(t.extent(&(64..128), Rights::Read), Err(64));
}
