//! `SVM_DISABLE`: pretending that the kernel lacks something.
//!
//! A comma-separated list of the words below forces the fallback for each, so that every fallback can
//! be tested on a kernel that has everything. Read once, on the control path. A word that is none of them is an error of the first mirror or
//! device: else a test of a fallback would pass without it.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::uffd::Features;

bitflags::bitflags! {
    /// What `SVM_DISABLE` names.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Disabled: u32 {
        const USERFAULTFD = 1 << 0;
        const KERNEL_FAULTS = 1 << 1;
        const MOVE = 1 << 2;
        const WP = 1 << 3;
        const WP_ASYNC = 1 << 4;
        const POISON = 1 << 5;
        const SIGBUS = 1 << 6;
        const EVENTS = 1 << 7;
        const THREAD_ID = 1 << 8;
        const EXACT_ADDRESS = 1 << 9;
        const PAGEMAP_SCAN = 1 << 10;
        const PROCMAP_QUERY = 1 << 11;
        const MEMBARRIER = 1 << 12;
        const PROCESS_VM = 1 << 13;
    }
}

/// Every word with what it disables.
pub(crate) const WORDS: &[(&str, Disabled)] = &[
    ("userfaultfd", Disabled::USERFAULTFD),
    ("kernel_faults", Disabled::KERNEL_FAULTS),
    ("move", Disabled::MOVE),
    ("wp", Disabled::WP),
    ("wp_async", Disabled::WP_ASYNC),
    ("poison", Disabled::POISON),
    ("sigbus", Disabled::SIGBUS),
    ("events", Disabled::EVENTS),
    ("thread_id", Disabled::THREAD_ID),
    ("exact_address", Disabled::EXACT_ADDRESS),
    ("pagemap_scan", Disabled::PAGEMAP_SCAN),
    ("procmap_query", Disabled::PROCMAP_QUERY),
    ("membarrier", Disabled::MEMBARRIER),
    ("process_vm", Disabled::PROCESS_VM),
];

/// The variable's name.
pub(crate) const VARIABLE: &str = "SVM_DISABLE";

impl Disabled {
    /// What this process's environment disables. Control path: the first call reads the environment.
    pub(crate) fn current() -> Self {
        Self::from_bits_truncate(known())
    }

    /// Parses a list, and hands every unknown word to `unknown`.
    fn parse(list: &str, mut unknown: impl FnMut(&str)) -> Self {
        let mut disabled = Self::empty();
        for word in list.split(',').map(str::trim).filter(|w| !w.is_empty()) {
            match WORDS.iter().find(|(name, _)| *name == word) {
                Some((_, flag)) => disabled |= *flag,
                None => unknown(word),
            }
        }
        disabled
    }

    /// What is wrong with the words of `list` that are none.
    pub(crate) fn mistakes(list: &str) -> Vec<String> {
        let mut mistakes = Vec::new();
        Self::parse(list, |word| {
            let known: Vec<_> = WORDS.iter().map(|(word, _)| *word).collect();
            let known = known.join(", ");
            mistakes.push(format!(
                "{VARIABLE}: `{word}` is unknown; known are {known}"
            ));
        });
        mistakes
    }

    /// The uffd features these words take away.
    pub(crate) fn features(self) -> Features {
        let table = [
            (Self::MOVE, Features::MOVE),
            (
                Self::WP,
                Features::PAGEFAULT_FLAG_WP
                    | Features::WP_HUGETLBFS_SHMEM
                    | Features::WP_UNPOPULATED
                    | Features::WP_ASYNC,
            ),
            (Self::WP_ASYNC, Features::WP_ASYNC),
            (Self::POISON, Features::POISON),
            (Self::SIGBUS, Features::SIGBUS),
            (
                Self::EVENTS,
                Features::EVENT_FORK
                    | Features::EVENT_REMAP
                    | Features::EVENT_REMOVE
                    | Features::EVENT_UNMAP,
            ),
            (Self::THREAD_ID, Features::THREAD_ID),
            (Self::EXACT_ADDRESS, Features::EXACT_ADDRESS),
        ];
        table
            .into_iter()
            .filter(|(word, _)| self.contains(*word))
            .fold(Features::empty(), |all, (_, features)| all | features)
    }
}

/// Some word was none.
const MISTAKEN: u32 = 1 << 30;

/// The words of this process's environment as bits, and whether there was a mistake: as it was when that was first asked.
fn known() -> u32 {
    // Threads that ask first at once find the same, and the word is all there is: Relaxed. Not a lock: in a child forked meanwhile nobody
    // would ever give it back. For the same reason the environment, which has one, is read again only to say what is wrong with it.
    const KNOWN: u32 = 1 << 31;
    static CURRENT: AtomicU32 = AtomicU32::new(0);
    let known = CURRENT.load(Relaxed);
    if known & KNOWN != 0 {
        return known;
    }
    let mut mistaken = 0;
    let disabled = Disabled::parse(&list().unwrap_or_default(), |_| mistaken = MISTAKEN);
    let known = disabled.bits() | mistaken | KNOWN;
    CURRENT.store(known, Relaxed);
    known
}

/// What the variable says, if it is set. Of what is no text some word is none.
pub(crate) fn list() -> Option<String> {
    std::env::var_os(VARIABLE).map(|list| list.to_string_lossy().into_owned())
}

/// Whether the environment makes sense. Control path.
pub(crate) fn check() -> io::Result<()> {
    if known() & MISTAKEN == 0 {
        return Ok(());
    }
    let mistake = Disabled::mistakes(&list().unwrap_or_default())
        .into_iter()
        .next()
        .unwrap_or_else(|| format!("{VARIABLE} had a word that is unknown"));
    Err(io::Error::new(io::ErrorKind::InvalidInput, mistake))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_parsed_and_strangers_reported() {
        let mut strangers = Vec::new();
        let disabled = Disabled::parse(" move,,poison , mvoe", |w| strangers.push(w.to_owned()));
        assert_eq!(disabled, Disabled::MOVE | Disabled::POISON);
        assert_eq!(strangers, ["mvoe"]);
        assert_eq!(disabled.features(), Features::MOVE | Features::POISON);
    }

    #[test]
    fn every_flag_has_a_word() {
        let named = WORDS.iter().fold(Disabled::empty(), |all, (_, f)| all | *f);
        assert_eq!(named, Disabled::all());
        assert_eq!(named.bits() & MISTAKEN, 0);
    }
}
