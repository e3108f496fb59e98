//! Unit tests of the table; apart from it, because the models include that file with loom's atomics.

use crate::shootdown::{Rights, Users};
use crate::sync::AtomicU64;
use crate::table::{Extent, Place, Table, WORD, Words, mask, words};

impl Words for Vec<AtomicU64> {
    fn word(&self, i: usize) -> &AtomicU64 {
        &self[i]
    }
}

fn table(nr_pages: usize) -> Table<Vec<AtomicU64>> {
    let words = || {
        (0..nr_pages.div_ceil(WORD))
            .map(|_| AtomicU64::new(0))
            .collect()
    };
    Table::new(words(), words(), words())
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
fn the_right_to_write_is_not_the_right_to_read() {
    let t = table(64);
    t.install(0, 0b101, 0b110, 0b100);
    assert_eq!(t.place(0, Rights::Read), Some(Place::Window));
    assert_eq!(t.place(0, Rights::Write), None);
    assert_eq!(
        t.place(1, Rights::Read),
        Some(Place::Window),
        "who may write may read"
    );
    assert_eq!(t.place(2, Rights::Write), Some(Place::Host));
    assert_eq!(t.place(3, Rights::Read), None);
}

#[test]
fn an_extent_says_where_all_of_it_is_or_what_is_missing() {
    let t = table(192);
    t.install(0, u64::MAX, u64::MAX, 0);
    t.install(1, u64::MAX, u64::MAX, u64::MAX);
    assert_eq!(t.extent(&(3..60), Rights::Write), Ok(Extent::Window));
    assert_eq!(t.extent(&(64..128), Rights::Write), Ok(Extent::InPlace));
    assert_eq!(t.extent(&(63..65), Rights::Read), Ok(Extent::Mixed));
    assert_eq!(t.extent(&(63..130), Rights::Read), Err(128));
    assert_eq!(t.nr_missing(&(63..130), Rights::Read), 2);
    assert_eq!(t.extent(&(5..5), Rights::Read), Ok(Extent::Window));
}

#[test]
fn readers_may_stay() {
    let t = table(128);
    t.install(1, u64::MAX, u64::MAX, 0);
    t.clear(1, 0xffc0, Users::Writers);
    assert_eq!(t.extent(&(64..128), Rights::Read), Ok(Extent::Window));
    assert_eq!(t.extent(&(64..128), Rights::Write), Err(70));
    assert_eq!(t.nr_missing(&(64..128), Rights::Write), 10);
    t.clear(1, u64::MAX, Users::All);
    assert_eq!(t.extent(&(64..128), Rights::Read), Err(64));
}

#[test]
fn a_page_that_comes_back_may_be_elsewhere() {
    let t = table(64);
    t.install(0, 0b11, 0, 0b01);
    assert_eq!(t.place(0, Rights::Read), Some(Place::Host));
    assert_eq!(
        t.place(0, Rights::Write),
        None,
        "in place, but to be read only"
    );
    t.clear(0, 0b01, Users::All);
    assert_eq!(t.place(0, Rights::Read), None);
    t.install(0, 0b01, 0b01, 0);
    assert_eq!(t.place(0, Rights::Write), Some(Place::Window));
    assert_eq!(
        t.place(1, Rights::Read),
        Some(Place::Window),
        "an install leaves other pages as they are"
    );
}
