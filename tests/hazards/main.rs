//! Rules of `runtime/HAZARDS.md` that no other test fails without, by its letters.
//!
//! - `events` (G), `movement` (M), `waiting` (W), `signals` (S), `forks` (F), `huge_pages` (H), `edges` (E).
//! - `fixture`: what each test is run with; `ring`: who holds on to pages, for DMA.

#![cfg(target_os = "linux")]
#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer and its use, under one proof"
)]

mod edges;
mod events;
mod fixture;
mod forks;
mod huge_pages;
mod movement;
mod ring;
mod signals;
mod waiting;

const PAGE: usize = 4096;
