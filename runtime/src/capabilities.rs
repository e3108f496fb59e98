//! What this process may have of the kernel, why not, and what is done instead.
//!
//! [`Capabilities::probe`] tries everything the runtime builds on, and says of each whether it can be
//! had, in words a user can act on. Printing it is what `accel-sim doctor` does:
//!
//! ```
//! let capabilities = svm::Capabilities::probe();
//! println!("{capabilities}");
//! # assert!(capabilities.to_string().contains("userfaultfd"));
//! ```
//!
//! A missing capability is never hidden: the runtime either has a fallback for it, which the table names
//! and `SVM_DISABLE` forces, or refuses with an error. A word in `SVM_DISABLE` that is none is an error of the first mirror or device.

use std::fmt;

/// Something of the kernel that the runtime uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Capability {
    /// Page faults of user code, handled in user space. Nothing works without.
    Userfaultfd,
    /// Page faults of system calls too: they may then be handed mirrored memory without a pin.
    KernelFaults,
    /// A fault is a signal in the faulting thread, which resolves it itself.
    Sigbus,
    /// Pages can be write-protected: shared for reading, and copied without losing a write. Nothing works without.
    WriteProtect,
    /// Pages change owner without being copied.
    Move,
    /// An access that the monitor thread cannot serve, to a page whose contents are lost, fails as one to bad memory does.
    Poison,
    /// Events for mremap, munmap and madvise.
    Events,
    /// Events for fork. Not needed: the runtime brings pages home before a fork.
    ForkEvents,
    /// Written pages are recorded by the kernel, without a fault to handle.
    WriteProtectAsync,
    /// Fault messages name the thread.
    ThreadId,
    /// Fault messages carry the whole address.
    ExactAddress,
    /// Shared memory faults are handled.
    SharedMemory,
    /// Huge pages of the reserved pool are handled.
    Hugetlb,
    /// The page table is read by range.
    PagemapScan,
    /// A mapping is looked up by address.
    ProcmapQuery,
    /// The fence of a translation hit is free.
    Membarrier,
    /// Memory is copied with an error, not a signal, where it is gone.
    FaultTolerantCopy,
    /// Transparent huge pages.
    TransparentHugePages,
}

/// Whether a capability can be had.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Support {
    /// It can.
    Yes,
    /// It can, to an extent, or by a detour.
    Partly(String),
    /// It can, but `SVM_DISABLE` says not to.
    Disabled,
    /// It can't, and why.
    No(String),
}

impl Support {
    /// Whether the runtime will use it.
    pub fn is_available(&self) -> bool {
        matches!(self, Self::Yes | Self::Partly(_))
    }
}

impl fmt::Display for Support {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Yes => f.write_str("yes"),
            Self::Partly(how) => write!(f, "yes: {how}"),
            Self::Disabled => f.write_str("no: disabled by SVM_DISABLE"),
            Self::No(why) => write!(f, "no: {why}"),
        }
    }
}

impl Capability {
    /// All of them, the essential first.
    pub const ALL: [Self; 18] = [
        Self::Userfaultfd,
        Self::KernelFaults,
        Self::Sigbus,
        Self::WriteProtect,
        Self::Move,
        Self::Poison,
        Self::Events,
        Self::ForkEvents,
        Self::WriteProtectAsync,
        Self::ThreadId,
        Self::ExactAddress,
        Self::SharedMemory,
        Self::Hugetlb,
        Self::PagemapScan,
        Self::ProcmapQuery,
        Self::Membarrier,
        Self::FaultTolerantCopy,
        Self::TransparentHugePages,
    ];

    /// A short name, stable across versions.
    pub fn name(self) -> &'static str {
        match self {
            Self::Userfaultfd => "userfaultfd",
            Self::KernelFaults => "kernel faults",
            Self::Sigbus => "SIGBUS delivery",
            Self::WriteProtect => "write-protect",
            Self::Move => "UFFDIO_MOVE",
            Self::Poison => "UFFDIO_POISON",
            Self::Events => "mapping events",
            Self::ForkEvents => "fork events",
            Self::WriteProtectAsync => "async write-protect",
            Self::ThreadId => "thread id",
            Self::ExactAddress => "exact address",
            Self::SharedMemory => "shared memory",
            Self::Hugetlb => "hugetlb",
            Self::PagemapScan => "PAGEMAP_SCAN",
            Self::ProcmapQuery => "PROCMAP_QUERY",
            Self::Membarrier => "membarrier",
            Self::FaultTolerantCopy => "process_vm_readv",
            Self::TransparentHugePages => "transparent huge pages",
        }
    }

    /// The Linux version that brought it.
    pub fn since(self) -> &'static str {
        match self {
            Self::Userfaultfd | Self::KernelFaults => "4.3",
            Self::Events | Self::ForkEvents => "4.11",
            Self::Sigbus | Self::ThreadId | Self::Membarrier => "4.14",
            Self::WriteProtect => "5.7",
            Self::ExactAddress => "5.18",
            Self::SharedMemory | Self::Hugetlb => "5.19",
            Self::Poison => "6.6",
            Self::WriteProtectAsync | Self::PagemapScan => "6.7",
            Self::Move => "6.8",
            Self::ProcmapQuery => "6.11",
            Self::FaultTolerantCopy => "3.2",
            Self::TransparentHugePages => "2.6.38",
        }
    }

    /// What is done without it.
    pub fn fallback(self) -> &'static str {
        match self {
            Self::Userfaultfd => "none: mirroring is refused",
            Self::KernelFaults => "a system call on a page that is away fails with EFAULT: pin it",
            Self::Sigbus => "faults are resolved by a monitor thread",
            Self::WriteProtect => "none: mirroring is refused",
            Self::Move => "pages are write-protected, copied and dropped",
            Self::Poison => {
                "an access that the monitor thread cannot serve ends the process with a message"
            }
            Self::Events => "changes of mappings must go through svm's own wrappers",
            Self::ForkEvents => "pages come home before a fork",
            Self::WriteProtectAsync => "each first write is a fault",
            Self::ThreadId | Self::ExactAddress => "less detail in traces",
            Self::SharedMemory | Self::Hugetlb => "such memory is served in place",
            Self::PagemapScan => "/proc/self/pagemap is read word by word",
            Self::ProcmapQuery => "/proc/self/maps is parsed",
            Self::Membarrier => "a full fence on every translation hit",
            Self::FaultTolerantCopy => "edges of a slice are copied directly",
            Self::TransparentHugePages => "pages move as runs of 4 KiB",
        }
    }
}

/// What the running kernel lets this process have.
#[derive(Debug, Clone)]
pub struct Capabilities {
    kernel: String,
    /// In the order of [`Capability::ALL`].
    support: Vec<(Capability, Support)>,
    /// What to know beyond yes and no.
    notes: Vec<String>,
}

impl Capabilities {
    /// Tries everything. Takes well under a millisecond and changes nothing, but for registering the
    /// process with membarrier(2).
    pub fn probe() -> Self {
        platform::probe()
    }

    /// Whether one of them can be had.
    pub fn support(&self, capability: Capability) -> &Support {
        const UNKNOWN: &Support = &Support::No(String::new());
        self.iter()
            .find(|(each, _)| *each == capability)
            .map_or(UNKNOWN, |(_, support)| support)
    }

    /// Whether memory can be mirrored at all. Not where `SVM_DISABLE` has a word that is none.
    pub fn is_usable(&self) -> bool {
        let makes_sense = crate::sys::disable::check().is_ok();
        makes_sense && self.has(Capability::Userfaultfd) && self.has(Capability::WriteProtect)
    }

    /// Whether the runtime will use it.
    pub fn has(&self, capability: Capability) -> bool {
        self.support(capability).is_available()
    }

    /// All of them, the essential first.
    pub fn iter(&self) -> impl Iterator<Item = (Capability, &Support)> {
        self.support.iter().map(|(each, support)| (*each, support))
    }

    /// The kernel's name and version.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// What to know beyond yes and no: settings, and what would help.
    pub fn notes(&self) -> impl Iterator<Item = &str> {
        self.notes.iter().map(String::as_str)
    }
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.kernel)?;
        for (capability, support) in self.iter() {
            write!(f, "  {:<22} {support}", capability.name())?;
            if !support.is_available() {
                write!(
                    f,
                    " (Linux {}); instead: {}",
                    capability.since(),
                    capability.fallback()
                )?;
            }
            writeln!(f)?;
        }
        self.notes().try_for_each(|note| writeln!(f, "  - {note}"))
    }
}

#[cfg(any(not(target_os = "linux"), svm_unsupported))]
mod platform {
    use super::{Capabilities, Capability, Support};

    pub(super) fn probe() -> Capabilities {
        let support = |each| (each, Support::No("userfaultfd is Linux's".into()));
        Capabilities {
            kernel: std::env::consts::OS.into(),
            support: Capability::ALL.into_iter().map(support).collect(),
            notes: Vec::new(),
        }
    }
}

#[cfg(all(target_os = "linux", not(svm_unsupported)))]
mod platform {
    use std::fs;
    use std::io;

    use super::{Capabilities, Capability, Support};
    use crate::addr::PAGE_SIZE;
    use crate::sys::disable::{Disabled, VARIABLE, list};
    use crate::sys::maps::Maps;
    use crate::sys::pagemap::Pagemap;
    use crate::sys::process::Status;
    use crate::sys::uffd::{DEVICE, FaultScope, Features, OpenError, Uffd};
    use crate::sys::{membarrier, process};

    pub(super) fn probe() -> Capabilities {
        let disabled = Disabled::current();
        let status = Status::read();
        let user = Uffd::probe(FaultScope::UserMode);
        let kernel_faults = Uffd::probe(FaultScope::UserAndKernel);
        let support = Capability::ALL
            .into_iter()
            .map(|each| {
                let support = match each {
                    Capability::Userfaultfd => userfaultfd(&user, disabled),
                    Capability::KernelFaults => {
                        kernel_faults_support(&kernel_faults, disabled, &status)
                    }
                    Capability::PagemapScan => by_file(
                        disabled.contains(Disabled::PAGEMAP_SCAN),
                        Pagemap::open().map(|pagemap| pagemap.has_scan()),
                    ),
                    Capability::ProcmapQuery => by_file(
                        disabled.contains(Disabled::PROCMAP_QUERY),
                        Maps::open().map(|maps| maps.has_query()),
                    ),
                    Capability::Membarrier if disabled.contains(Disabled::MEMBARRIER) => {
                        Support::Disabled
                    }
                    Capability::Membarrier => match membarrier::init() {
                        Ok(()) => Support::Yes,
                        Err(error) => Support::No(format!("membarrier(2): {error}")),
                    },
                    Capability::FaultTolerantCopy => fault_tolerant_copy(disabled),
                    Capability::TransparentHugePages => transparent_huge_pages(),
                    Capability::ForkEvents => match &user {
                        Ok(_) if !status.has_ptrace() => Support::No("needs CAP_SYS_PTRACE".into()),
                        features => by_feature(each, features, disabled),
                    },
                    _ => by_feature(each, &user, disabled),
                };
                (each, support)
            })
            .collect();
        Capabilities {
            kernel: kernel(),
            support,
            notes: notes(),
        }
    }

    fn kernel() -> String {
        let read = |name| fs::read_to_string(format!("/proc/sys/kernel/{name}"));
        match (read("ostype"), read("osrelease")) {
            (Ok(system), Ok(release)) => format!(
                "{} {}, {}",
                system.trim(),
                release.trim(),
                std::env::consts::ARCH
            ),
            _ => "Linux, of unknown version (no /proc)".into(),
        }
    }

    fn userfaultfd(probed: &Result<Features, OpenError>, disabled: Disabled) -> Support {
        if process::page_size() != PAGE_SIZE {
            let size = process::page_size();
            return Support::No(format!(
                "pages of {size} bytes; this runtime knows 4096 only"
            ));
        }
        match probed {
            Ok(_) => Support::Yes,
            Err(_) if disabled.contains(Disabled::USERFAULTFD) => Support::Disabled,
            Err(error) => Support::No(format!("{error}; {}", error.help())),
        }
    }

    fn kernel_faults_support(
        probed: &Result<Features, OpenError>,
        disabled: Disabled,
        status: &Status,
    ) -> Support {
        match probed {
            Ok(_) if status.has_ptrace() => Support::Partly("by CAP_SYS_PTRACE".into()),
            Ok(_) => Support::Partly(format!("by vm.unprivileged_userfaultfd=1 or {DEVICE}")),
            Err(_) if disabled.intersects(Disabled::USERFAULTFD | Disabled::KERNEL_FAULTS) => {
                Support::Disabled
            }
            Err(error) => Support::No(format!(
                "{error}; any of these would do: CAP_SYS_PTRACE, \
                 sysctl vm.unprivileged_userfaultfd=1, access to {DEVICE} \
                 (setfacl -m u:NAME:rw {DEVICE})"
            )),
        }
    }

    /// Whether all features that make up a capability are there.
    fn by_feature(
        capability: Capability,
        probed: &Result<Features, OpenError>,
        disabled: Disabled,
    ) -> Support {
        let needed = match capability {
            Capability::Sigbus => Features::SIGBUS,
            Capability::WriteProtect => Features::PAGEFAULT_FLAG_WP,
            Capability::Move => Features::MOVE,
            Capability::Poison => Features::POISON,
            Capability::Events => {
                Features::EVENT_REMAP | Features::EVENT_REMOVE | Features::EVENT_UNMAP
            }
            Capability::ForkEvents => Features::EVENT_FORK,
            Capability::WriteProtectAsync => Features::WP_ASYNC,
            Capability::ThreadId => Features::THREAD_ID,
            Capability::ExactAddress => Features::EXACT_ADDRESS,
            Capability::SharedMemory => Features::MISSING_SHMEM | Features::WP_HUGETLBFS_SHMEM,
            Capability::Hugetlb => Features::MISSING_HUGETLBFS | Features::WP_HUGETLBFS_SHMEM,
            _ => Features::empty(),
        };
        match probed {
            Err(_) => Support::No("no userfaultfd".into()),
            Ok(features) if features.contains(needed) => Support::Yes,
            Ok(_) if disabled.features().intersects(needed) => Support::Disabled,
            Ok(_) => Support::No("the kernel does not offer it".into()),
        }
    }

    fn by_file(disabled: bool, works: io::Result<bool>) -> Support {
        match works {
            Ok(true) => Support::Yes,
            Ok(false) if disabled => Support::Disabled,
            Ok(false) => Support::No("the kernel does not offer it".into()),
            Err(error) => Support::No(format!("/proc: {error}")),
        }
    }

    fn fault_tolerant_copy(disabled: Disabled) -> Support {
        if disabled.contains(Disabled::PROCESS_VM) {
            return Support::Disabled;
        }
        let (source, mut target) = (1_u8, 0_u8);
        let at = (&raw const source).expose_provenance();
        // SAFETY: `target` is valid for a write of one byte.
        match unsafe { process::copy_from_fallible(&raw mut target, at, 1) } {
            Ok(_) => Support::Yes,
            Err(error) => Support::No(format!("process_vm_readv(2): {error}")),
        }
    }

    fn transparent_huge_pages() -> Support {
        let path = "/sys/kernel/mm/transparent_hugepage/enabled";
        let text = fs::read_to_string(path).unwrap_or_default();
        // The choice in force stands in brackets.
        let choice = text
            .split_once('[')
            .and_then(|(_, rest)| rest.split_once(']'))
            .map(|(choice, _)| choice);
        match choice {
            Some("always") => Support::Yes,
            Some("madvise") => Support::Partly("where asked for (madvise)".into()),
            Some(choice) => Support::No(format!("{path} says {choice}")),
            None => Support::No("a kernel without CONFIG_TRANSPARENT_HUGEPAGE".into()),
        }
    }

    fn notes() -> Vec<String> {
        let mut notes = Vec::new();
        if let Ok(value) = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd") {
            notes.push(format!("vm.unprivileged_userfaultfd = {}", value.trim()));
        }
        notes.push(
            match fs::File::options().read(true).write(true).open(DEVICE) {
                Ok(_) => format!("{DEVICE}: accessible"),
                Err(error) => format!("{DEVICE}: {error}"),
            },
        );
        let pool = |name| {
            fs::read_to_string(format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}")).ok()
        };
        if let (Some(reserved), Some(free)) = (pool("nr_hugepages"), pool("free_hugepages")) {
            let (reserved, free) = (reserved.trim(), free.trim());
            notes.push(format!(
                "hugetlb pool of 2 MiB pages: {reserved}, of which free: {free}"
            ));
        }
        if let Some(list) = list() {
            notes.push(format!("{VARIABLE}={list}"));
            notes.extend(Disabled::mistakes(&list));
        }
        notes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_capability_is_probed_once_and_in_order() {
        let capabilities = Capabilities::probe();
        let probed: Vec<_> = capabilities.iter().map(|(each, _)| each).collect();
        assert_eq!(probed, Capability::ALL);
        assert!(probed.is_sorted());
        for (capability, support) in capabilities.iter() {
            assert_eq!(capabilities.support(capability), support);
        }
    }

    #[test]
    fn what_is_missing_is_printed_with_its_fallback() {
        let capabilities = Capabilities {
            kernel: "Linux 4.14".into(),
            support: vec![
                (Capability::Userfaultfd, Support::Yes),
                (
                    Capability::Move,
                    Support::No("the kernel does not offer it".into()),
                ),
                (Capability::Poison, Support::Disabled),
                (
                    Capability::TransparentHugePages,
                    Support::Partly("where asked for".into()),
                ),
            ],
            notes: vec!["a note".into()],
        };
        let expected = "\
Linux 4.14
  userfaultfd            yes
  UFFDIO_MOVE            no: the kernel does not offer it (Linux 6.8); \
instead: pages are write-protected, copied and dropped
  UFFDIO_POISON          no: disabled by SVM_DISABLE (Linux 6.6); \
instead: an access that the monitor thread cannot serve ends the process with a message
  transparent huge pages yes: where asked for
  - a note
";
        assert_eq!(capabilities.to_string(), expected);
        assert!(!capabilities.has(Capability::Move) && capabilities.has(Capability::Userfaultfd));
        assert!(
            !capabilities.has(Capability::Events),
            "not probed is not had"
        );
    }

    #[cfg(all(target_os = "linux", not(svm_unsupported)))]
    mod linux {
        use super::super::*;
        use crate::sys::disable::{Disabled, WORDS, list};
        use crate::sys::testing::{in_child, test_name};

        #[test]
        fn without_userfaultfd_nothing_is_left_but_what_stands_alone() {
            let name = test_name!("without_userfaultfd_nothing_is_left_but_what_stands_alone");
            let body = || {
                let capabilities = Capabilities::probe();
                let disabled = [Capability::Userfaultfd, Capability::KernelFaults];
                for each in disabled {
                    assert_eq!(*capabilities.support(each), Support::Disabled);
                }
                assert!(!capabilities.is_usable());
                let expected = Support::No("no userfaultfd".into());
                assert_eq!(*capabilities.support(Capability::Move), expected);
            };
            if let Some(ended) = in_child(name, &[("SVM_DISABLE", "userfaultfd")], body) {
                ended.assert_passed();
            }
        }

        /// For each word: what is said to be usable can be mirrored, and what is not is refused by name.
        #[test]
        fn usable_means_that_memory_can_be_mirrored() {
            let name = test_name!("usable_means_that_memory_can_be_mirrored");
            let strangers = ["move,wp_asink", "MOVE"];
            for word in WORDS.iter().map(|(word, _)| *word).chain(strangers) {
                let body = || {
                    let capabilities = Capabilities::probe();
                    match crate::mirror(&mut [0_u64; 4096]).map(drop) {
                        Ok(()) => assert!(capabilities.is_usable(), "{capabilities}"),
                        Err(error) => {
                            let list = list().unwrap_or_default();
                            let is_mistaken = !Disabled::mistakes(&list).is_empty();
                            assert_ne!(error.is_unsupported(), is_mistaken, "{error}");
                            assert!(!capabilities.is_usable(), "{error}: {capabilities}");
                            assert!(error.to_string().contains("SVM_DISABLE"), "{error}");
                        }
                    }
                };
                if let Some(ended) = in_child(name, &[("SVM_DISABLE", word)], body) {
                    ended.assert_passed();
                }
            }
        }

        #[test]
        fn words_in_the_environment_take_capabilities_away() {
            let name = test_name!("words_in_the_environment_take_capabilities_away");
            let words = "move,wp,poison,sigbus,events,pagemap_scan,procmap_query,membarrier,process_vm,mvoe";
            let body = || {
                let capabilities = Capabilities::probe();
                let taken = [
                    Capability::Move,
                    Capability::WriteProtect,
                    Capability::Poison,
                    Capability::Sigbus,
                    Capability::Events,
                    Capability::PagemapScan,
                    Capability::ProcmapQuery,
                    Capability::Membarrier,
                    Capability::FaultTolerantCopy,
                ];
                for each in taken {
                    assert_eq!(*capabilities.support(each), Support::Disabled, "{each:?}");
                }
                assert!(capabilities.has(Capability::Userfaultfd));
                assert!(
                    capabilities
                        .notes()
                        .any(|note| note.contains("`mvoe` is unknown"))
                );
            };
            if let Some(ended) = in_child(name, &[("SVM_DISABLE", words)], body) {
                ended.assert_passed();
            }
        }
    }
}
