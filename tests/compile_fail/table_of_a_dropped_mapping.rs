//! A device's table of a region is there while somebody holds the mapping.

use svm::MappedRef;
use tests::Dummy;
use tests::device::Table;

fn table<'t>(mapped: MappedRef<Dummy>) -> &'t Table {
    mapped.table()
}

fn main() {}
