//! Twins of the kernel's `tools/testing/selftests/mm/hmm-tests.c`, under the same names: real system calls on real memory, the
//! test device of [`tests::mm`], both doors, every granule; and again under each forced fallback.
//!
//! - `map`: mappings, and the ints in them; `fixture`: devices, and what each test is run with.
//! - `twins`; and of them `pinned`: system calls, and `huge`: migrations of huge pages.
//! - `more`: what the kernel's suite lacks.
//! - `fallbacks`: all of it again, with features of the kernel taken away.
//!
//! Calls that unmap or move are bare where the kernel tells of them, and made through the wrappers where it does not
//! (`SVM_DISABLE=events`): that is what is promised there. What a bare call does then is `more::unheard_calls`.

mod fallbacks;
mod fixture;
mod huge;
mod map;
mod more;
mod pinned;
mod twins;

use std::sync::OnceLock;

use svm::{Capabilities, Capability};

const PAGE: usize = 4096;
const HUGE: usize = 2 << 20;
/// As in the kernel's suite.
const SIZE: usize = 4 << 20;
const NPAGES: usize = SIZE / PAGE;

fn has(capability: Capability) -> bool {
    static PROBED: OnceLock<Capabilities> = OnceLock::new();
    PROBED.get_or_init(Capabilities::probe).has(capability)
}

/// Without PAGEMAP_SCAN nobody tells zero pages and huge pages from others.
fn sees_zero_pages() -> bool {
    !std::env::var("SVM_DISABLE").is_ok_and(|words| words.contains("pagemap_scan"))
}
