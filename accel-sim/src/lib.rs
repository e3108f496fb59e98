//! A simulated accelerator on `svm`.
mod chunk;
mod shootdown;
mod sync;
mod table;
#[cfg(test)]
mod table_tests;
