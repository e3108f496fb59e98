//! [`Map`]: an anonymous mapping that a test mirrors by address, and changes by system calls; and tests in processes of their
//! own, with all options.

use std::fmt::Display;
use std::process::{Command, Output};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use svm::{Delivery, Granule, Mirror, Options};

use crate::{Watchdog, usable};

const PAGE: usize = 4096;

/// Readable and writable.
pub const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// An anonymous mapping. It stays when it is dropped: tests change it in every way, and some of it may be somebody else's.
#[derive(Clone, Copy, Debug)]
pub struct Map {
    /// Where it begins.
    pub addr: usize,
    /// Its length.
    pub pages: usize,
}

impl Map {
    /// A mapping of `pages` pages, each filled with its number, from 1.
    ///
    /// # Panics
    /// If there is no room.
    #[must_use]
    pub fn new(pages: usize) -> Self {
        let map = Self::apart(pages, READ_WRITE);
        (0..pages).for_each(|page| map.write(page, page as u64 + 1));
        map
    }

    /// `pages` pages far from where the kernel looks for room, so that a hole made in them stays one.
    ///
    /// # Panics
    /// If there is no room.
    #[must_use]
    pub fn apart(pages: usize, prot: i32) -> Self {
        const START: usize = 0x3456_0000_0000;
        static NEXT: AtomicUsize = AtomicUsize::new(START);
        let hint = NEXT.fetch_add((pages + 16) * PAGE, Ordering::Relaxed);
        Self::at_hint(hint, pages, prot, 0)
    }

    /// `pages` pages at `addr` if `flags` say so.
    ///
    /// # Panics
    /// If there is no room.
    #[must_use]
    pub fn at_hint(addr: usize, pages: usize, prot: i32, flags: i32) -> Self {
        let hint = ptr::with_exposed_provenance_mut(addr);
        let flags = if flags & libc::MAP_SHARED == 0 {
            flags | libc::MAP_PRIVATE
        } else {
            flags
        };
        // SAFETY: a fresh mapping, or one over what the test has.
        let at =
            unsafe { libc::mmap(hint, pages * PAGE, prot, flags | libc::MAP_ANONYMOUS, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Self {
            addr: at.expose_provenance(),
            pages,
        }
    }

    /// The first word of a page.
    #[must_use]
    pub fn word(&self, page: usize) -> *mut u64 {
        ptr::with_exposed_provenance_mut(self.addr + page * PAGE)
    }

    /// The first byte of a page, as the system calls take it.
    #[must_use]
    pub fn at(&self, page: usize) -> *mut u8 {
        self.word(page).cast()
    }

    /// Writes a page's first word.
    pub fn write(&self, page: usize, value: u64) {
        // SAFETY: in the mapping; tests touch what is mapped.
        unsafe { self.word(page).write_volatile(value) }
    }

    /// Reads a page's first word.
    #[must_use]
    pub fn read(&self, page: usize) -> u64 {
        // SAFETY: as in `write`.
        unsafe { self.word(page).read_volatile() }
    }

    /// Mirrors all of it.
    ///
    /// # Panics
    /// If that fails.
    #[must_use]
    pub fn mirror(&self, options: &Options) -> Mirror<'static, u8> {
        // SAFETY: memory of the test's, which it changes by system calls as it says.
        unsafe { svm::mirror_raw(self.at(0), self.pages * PAGE, options) }.unwrap()
    }

    /// Unmaps all of it, by a bare call.
    ///
    /// # Panics
    /// If that fails.
    pub fn unmap(self) {
        // SAFETY: the test is done with it.
        let outcome = unsafe { libc::munmap(self.at(0).cast(), self.pages * PAGE) };
        assert_eq!(outcome, 0);
    }
}

/// The error number of a wrapper's refusal; 0 if there is none.
///
/// # Panics
/// If it is an error without a number.
#[must_use]
pub fn errno(result: svm::Result<()>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(error) => error.os_error().unwrap(),
    }
}

/// Names the test that a process was made for.
const MARK: &str = "SVM_TEST_OWN_PROCESS";

/// Whether this process was made by [`in_own_process`].
fn is_own_process() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Runs `body` in a process of its own for each of `lacking`, which is disabled there (`SVM_DISABLE`): it is the test of that name,
/// with the modules it is in, run again.
///
/// # Panics
/// If the body does, or the process dies, or no test has that name; with what it printed.
pub fn in_own_process(test: &str, lacking: &[&str], body: impl FnOnce()) {
    if std::env::var_os(MARK).is_some_and(|mark| mark == test) {
        return body();
    }
    lacking
        .iter()
        .for_each(|lacking| run_again(MARK, test, lacking));
}

fn run_again(mark: &str, test: &str, lacking: &str) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(mark, test)
        .env("SVM_DISABLE", lacking);
    let how = format_args!("without {lacking:?}");
    assert_passed_alone(test, how, &command.output().unwrap());
}

/// `output` is of a process that was to run `test` alone (`--exact`): it has run one test, which passed.
///
/// # Panics
/// If it has not: the test failed, or the process died, or it has no test of this name; with what it printed.
pub fn assert_passed_alone(test: &str, how: impl Display, output: &Output) {
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    // Success alone could mean that nothing has run.
    assert!(
        !said.trim_start().starts_with("running 0 tests"),
        "no test here is named {test}: a test's name begins with the modules it is in\n{said}{errors}"
    );
    let has_run_one = said.trim_start().starts_with("running 1 test\n");
    assert!(
        output.status.success() && has_run_one && said.contains("test result: ok. 1 passed;"),
        "{test} {how}: {}\n{said}{errors}",
        output.status
    );
}

/// What a kernel may lack that changes how calls are made on mirrored memory.
const LACKING: [&str; 4] = [
    "",
    "move",
    "events",
    "move,events,pagemap_scan,procmap_query",
];

/// Runs `test` through both doors, with each granule and policy, and again where the kernel lacks something.
///
/// # Panics
/// As [`in_own_process`].
pub fn each(name: &'static str, test: impl Fn(&Options)) {
    each_of(&[Granule::Page, Granule::Big, Granule::Huge], name, test);
}

/// The same with these granules alone.
///
/// # Panics
/// As [`in_own_process`].
pub fn each_of(granules: &[Granule], name: &'static str, test: impl Fn(&Options)) {
    // What runs the others waits for all of them, one after the other.
    let seconds = if is_own_process() { 50 } else { 220 };
    let _watchdog = Watchdog::with_timeout(name, Duration::from_secs(seconds));
    if !usable() {
        return;
    }
    in_own_process(name, &LACKING, || {
        options(granules).for_each(|options| test(&options));
    });
}

/// Both doors, each of `granules`, with and without duplicates.
fn options(granules: &[Granule]) -> impl Iterator<Item = Options> {
    let doors = [Delivery::Inline, Delivery::Thread].into_iter();
    doors.flat_map(|delivery| {
        granules.iter().flat_map(move |&granule| {
            let options = Options::new().delivery(delivery).granule(granule);
            [false, true].map(|read_mostly| options.clone().read_mostly(read_mostly))
        })
    })
}

/// Runs `test` with both doors, each granule, with and without duplicates; `name` is the watchdog's.
pub fn each_option(name: &'static str, test: impl Fn(&Options)) {
    let _watchdog = Watchdog::new(name);
    if usable() {
        options(&[Granule::Page, Granule::Big, Granule::Huge]).for_each(|options| test(&options));
    }
}
