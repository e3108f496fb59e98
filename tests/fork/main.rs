//! fork: the child has the memory of that moment, the parent goes on, and neither disturbs the other.
//!
//! - `contents`: what a child finds in its memory, and the parent in its own.
//! - `handles`: the parent's in a child, whatever they are at; and a child's own.
//! - `moments`: a fork in the middle of something, and something in the middle of a fork.
//! - `sharing`: pages that a child has, too, and a device is to have.
//! - `grown`: mappings that grow, have neighbours, or are unmapped.
//! - `fixture`: children, and what each test is run with.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer and its use, under one proof"
)]

mod contents;
mod fixture;
mod grown;
mod handles;
mod moments;
mod sharing;

const PAGE: usize = 4096;
