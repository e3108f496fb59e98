//! Nor can the leave to establish one be made up.

use svm::{Access, PageBits, PageMask, Valid};

fn commit(table: &PageBits) {
    let valid = Valid {
        block: 0,
        readable: PageMask::FULL,
        writable: PageMask::FULL,
        in_place: PageMask::EMPTY,
    };
    table.install(&valid, Access::Write);
}

fn main() {}
