//! Which mapping covers an address: PROCMAP_QUERY, or /proc/self/maps parsed by hand.
//!
//! As [`super::pagemap`]: the file belongs to the process that opened it, and an answer is a snapshot.
//! The query takes 0.2 µs and no allocation; the fallback reads and parses the text from its start,
//! in a fixed buffer, which is slow (and not atomic across buffer-fuls) but allocates nothing either.

use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::disable::Disabled;
use super::{ioctl, iowr};
use crate::addr::{PAGE_SIZE, PageRange};

/// What a mapping is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Private memory of the process, named by prctl or not.
    Anonymous,
    /// The heap that brk grows: anonymous too.
    Heap,
    /// The main thread's stack: anonymous too. Other threads' stacks look like any anonymous mapping.
    Stack,
    /// A file, a memfd, System V or anonymous shared memory.
    File,
    /// Huge pages from the reserved pool.
    Hugetlb,
    /// The kernel's own: vdso, vvar, vsyscall.
    Special,
}

impl Kind {
    /// Whether its pages are the process's own, so that a page is nowhere else.
    pub(crate) const fn is_anonymous(self) -> bool {
        matches!(self, Self::Anonymous | Self::Heap | Self::Stack)
    }
}

/// A mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Vma {
    /// Where.
    pub(crate) range: PageRange,
    /// PROT_READ.
    pub(crate) readable: bool,
    /// PROT_WRITE.
    pub(crate) writable: bool,
    /// PROT_EXEC.
    pub(crate) executable: bool,
    /// MAP_SHARED.
    pub(crate) shared: bool,
    /// What it is made of.
    pub(crate) kind: Kind,
}

/// `struct procmap_query` (6.11).
#[repr(C)]
#[derive(Default)]
struct ProcmapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

const PATH: &str = "/proc/self/maps";

const PROCMAP_QUERY: u32 = iowr::<ProcmapQuery>(b'f', 17);
const _: () = assert!(PROCMAP_QUERY == 0xC068_6611);

const VMA_READABLE: u64 = 1 << 0;
const VMA_WRITABLE: u64 = 1 << 1;
const VMA_EXECUTABLE: u64 = 1 << 2;
const VMA_SHARED: u64 = 1 << 3;
const COVERING_OR_NEXT_VMA: u64 = 1 << 4;

/// Longer than any name the kernel gives memory that is not a file.
const NAME_LEN: usize = 128;

/// The process's mappings, as the kernel shows them.
#[derive(Debug)]
pub(crate) struct Maps {
    file: File,
    /// Whether PROCMAP_QUERY works; decided at open.
    query: bool,
}

impl Maps {
    /// Opens the calling process's map of mappings. Control path.
    ///
    /// # Errors
    ///
    /// No /proc, or no descriptor left.
    pub(crate) fn open() -> io::Result<Self> {
        let mut maps = Self {
            file: File::open(PATH)?,
            query: true,
        };
        maps.query = !Disabled::current().contains(Disabled::PROCMAP_QUERY)
            && matches!(maps.query_ioctl(0), Ok(Some(_)));
        Ok(maps)
    }

    /// Whether PROCMAP_QUERY is in use.
    pub(crate) fn has_query(&self) -> bool {
        self.query
    }

    /// The mapping that covers `addr`. Fault path (hence not for memory whose own mapping is being
    /// changed by this thread).
    ///
    /// # Errors
    ///
    /// None that a process with an open map can meet but `EINTR` and `ENOMEM`.
    pub(crate) fn covering(&self, addr: usize) -> io::Result<Option<Vma>> {
        Ok(self
            .covering_or_next(addr)?
            .filter(|vma| vma.range.contains_addr(addr)))
    }

    /// The mapping that covers `addr`, or else the next above it. Fault path.
    ///
    /// # Errors
    ///
    /// As [`Maps::covering`].
    pub(crate) fn covering_or_next(&self, addr: usize) -> io::Result<Option<Vma>> {
        if self.query {
            self.query_ioctl(addr)
        } else {
            self.agreed_text(addr)
        }
    }

    /// What two readings of the text in a row agree on: while other threads change their mappings the text moves under a reader, who
    /// may see the end of one line behind the start of another.
    fn agreed_text(&self, addr: usize) -> io::Result<Option<Vma>> {
        const MAX_READINGS: usize = 64;
        let mut last = self.parse_text(addr)?;
        for _ in 1..MAX_READINGS {
            let next = self.parse_text(addr)?;
            if next == last {
                break;
            }
            last = next;
        }
        Ok(last)
    }

    /// Where the mapping that covers `addr` ends. Fault path, and sparing of stack: a handler may have 8 KiB in all, and has
    /// used most of it where this is asked.
    pub(crate) fn end_of(&self, addr: usize) -> Option<usize> {
        if !self.query {
            return Some(self.covering(addr).ok()??.range.end());
        }
        let query = self.query_named(addr, &mut []).ok()?;
        (query.vma_start as usize <= addr).then_some(query.vma_end as usize)
    }

    /// Visits the mappings that overlap a range, ascending. Fault path, if `visit` is.
    ///
    /// # Errors
    ///
    /// As [`Maps::covering`].
    pub(crate) fn walk(
        &self,
        range: PageRange,
        mut visit: impl FnMut(Vma) -> ControlFlow<()>,
    ) -> io::Result<()> {
        let mut addr = range.start();
        while addr < range.end() {
            match self.covering_or_next(addr)? {
                Some(vma) if vma.range.start() < range.end() => {
                    if visit(vma).is_break() {
                        break;
                    }
                    addr = vma.range.end();
                }
                _ => break,
            }
        }
        Ok(())
    }

    /// One PROCMAP_QUERY (two for a file with a long path).
    fn query_ioctl(&self, addr: usize) -> io::Result<Option<Vma>> {
        let mut name = [0; NAME_LEN];
        let (query, has_long_name) = match self.query_named(addr, &mut name) {
            // What does not fit is a file's path; nothing else has so long a name.
            Err(libc::ENAMETOOLONG) => (self.query_named(addr, &mut []), true),
            result => (result, false),
        };
        let query = match query {
            Ok(query) => query,
            Err(libc::ENOENT) => return Ok(None),
            Err(errno) => return Err(io::Error::from_raw_os_error(errno)),
        };
        let Some(range) = PageRange::new(query.vma_start as usize, query.vma_end as usize) else {
            return Ok(None);
        };
        let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
        let has = |flag| query.vma_flags & flag != 0;
        Ok(Some(Vma {
            range,
            readable: has(VMA_READABLE),
            writable: has(VMA_WRITABLE),
            executable: has(VMA_EXECUTABLE),
            shared: has(VMA_SHARED),
            kind: if query.vma_page_size > PAGE_SIZE as u64 {
                Kind::Hugetlb
            } else if has_long_name {
                Kind::File
            } else {
                kind_of(query.inode, name)
            },
        }))
    }

    /// PROCMAP_QUERY itself; the name goes into `name` if that is not empty. `Err` gives the errno.
    fn query_named(&self, addr: usize, name: &mut [u8]) -> Result<ProcmapQuery, i32> {
        let mut query = ProcmapQuery {
            size: size_of::<ProcmapQuery>() as u64,
            query_flags: COVERING_OR_NEXT_VMA,
            query_addr: addr as u64,
            ..ProcmapQuery::default()
        };
        if !name.is_empty() {
            query.vma_name_size = name.len() as u32;
            query.vma_name_addr = name.as_mut_ptr().expose_provenance() as u64;
        }
        // SAFETY: PROCMAP_QUERY reads and writes a ProcmapQuery, asserted by its number above, and
        // writes at most `vma_name_size` bytes to `vma_name_addr`, which is `name`.
        match unsafe { ioctl(self.file.as_fd(), PROCMAP_QUERY, &mut query) } {
            0 => Ok(query),
            errno => Err(errno),
        }
    }

    /// Looks through the text for the first mapping that ends above `addr`.
    fn parse_text(&self, addr: usize) -> io::Result<Option<Vma>> {
        // Small, with the line: an alternate signal stack may be 8 KiB in all.
        let mut buffer = [0_u8; 512];
        let mut line = Line::default();
        let mut offset = 0;
        loop {
            let read = match self.file.read_at(&mut buffer, offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            };
            if read == 0 {
                return Ok(None);
            }
            offset += read as u64;
            for &byte in buffer.iter().take(read) {
                if byte != b'\n' {
                    line.push(byte);
                    continue;
                }
                if let Some(vma) = parse_line(line.bytes())
                    && vma.range.end() > addr
                {
                    return Ok(Some(vma));
                }
                line = Line::default();
            }
        }
    }
}

/// Room for a line up to the start of its name, which begins in column 73.
const LINE_LEN: usize = 128;

/// The first bytes of a line of /proc/pid/maps: all but the tail of a long path.
struct Line {
    bytes: [u8; LINE_LEN],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; LINE_LEN],
            len: 0,
        }
    }
}

impl Line {
    fn push(&mut self, byte: u8) {
        if let Some(slot) = self.bytes.get_mut(self.len) {
            *slot = byte;
            self.len += 1;
        }
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// Parses `start-end perms offset dev inode   name`. `None` for what is not such a line, or lies above
/// user space.
fn parse_line(line: &[u8]) -> Option<Vma> {
    let line = str::from_utf8(line).ok().or_else(|| {
        // A path need not be UTF-8; what comes before it is.
        let end = line.iter().position(|byte| !byte.is_ascii())?;
        str::from_utf8(line.get(..end)?).ok()
    })?;
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let perms = fields.next()?.as_bytes();
    let (_offset, _device) = (fields.next()?, fields.next()?);
    let inode = fields.next()?.parse().ok()?;
    let name = fields.next().unwrap_or_default();
    let has = |index: usize, letter: u8| perms.get(index) == Some(&letter);
    Some(Vma {
        range: PageRange::new(
            usize::from_str_radix(start, 16).ok()?,
            usize::from_str_radix(end, 16).ok()?,
        )?,
        readable: has(0, b'r'),
        writable: has(1, b'w'),
        executable: has(2, b'x'),
        shared: has(3, b's'),
        kind: kind_of(inode, name.as_bytes()),
    })
}

fn kind_of(inode: u64, name: &[u8]) -> Kind {
    if inode != 0 {
        return if name.starts_with(b"/anon_hugepage") {
            Kind::Hugetlb
        } else {
            Kind::File
        };
    }
    match name {
        b"[heap]" => Kind::Heap,
        b"[stack]" => Kind::Stack,
        b"" => Kind::Anonymous,
        name if name.starts_with(b"[anon:") => Kind::Anonymous,
        // A file system whose inodes have number 0, or shared memory named by prctl.
        name if name.starts_with(b"/") || name.starts_with(b"[anon_shmem") => Kind::File,
        _ => Kind::Special,
    }
}

#[cfg(test)]
mod tests {
    use super::super::mmap::Reservation;
    use super::*;

    fn both() -> [Maps; 2] {
        let (first, mut second) = (Maps::open().unwrap(), Maps::open().unwrap());
        second.query = false;
        [first, second]
    }

    /// A mapping of the test's own, between two that are not accessible, so that it can't be merged.
    struct Fenced(Reservation);

    impl Fenced {
        fn new() -> Self {
            let like = PageRange::from_pages(PAGE_SIZE, 4).unwrap();
            let fenced = Self(Reservation::congruent_to(like).unwrap());
            for page in [0, 3] {
                fenced.protect(page, libc::PROT_NONE);
            }
            fenced
        }

        fn protect(&self, page: usize, protection: libc::c_int) {
            assert!(page < 4);
            let at = self.0.as_ptr().wrapping_add(page * PAGE_SIZE);
            // SAFETY: a page of the test's own that nobody accesses.
            let result = unsafe { libc::mprotect(at.cast(), PAGE_SIZE, protection) };
            assert_eq!(result, 0);
        }

        fn pages(&self, first: usize, nr: usize) -> PageRange {
            PageRange::from_pages(self.0.range().start() + first * PAGE_SIZE, nr).unwrap()
        }
    }

    #[test]
    fn an_anonymous_mapping_is_described_both_ways() {
        let memory = Fenced::new();
        let expected = Vma {
            range: memory.pages(1, 2),
            readable: true,
            writable: true,
            executable: false,
            shared: false,
            kind: Kind::Anonymous,
        };
        let at = memory.pages(2, 1).start() + 5;
        for maps in both() {
            assert_eq!(maps.covering(at).unwrap(), Some(expected));
        }
        memory.protect(1, libc::PROT_READ);
        let halves = [
            Vma {
                range: memory.pages(1, 1),
                writable: false,
                ..expected
            },
            Vma {
                range: memory.pages(2, 1),
                ..expected
            },
        ];
        for maps in both() {
            let mut seen = Vec::new();
            maps.walk(memory.pages(1, 2), |vma| {
                seen.push(vma);
                ControlFlow::Continue(())
            })
            .unwrap();
            assert_eq!(seen, halves);
        }
    }

    #[test]
    fn both_ways_agree_on_every_mapping() {
        let [query, text] = both();
        if !query.has_query() {
            return;
        }
        // The main thread's stack, the heap, code, and the kernel's own, as they come. Other tests map
        // and unmap meanwhile: a mapping counts if both see it, and enough must.
        let mut agreed = 0;
        let mut kinds = Vec::new();
        let mut addr = 0;
        while let Some(vma) = query.covering_or_next(addr).unwrap() {
            let start = vma.range.start();
            if let Some(other) = text.covering(start).unwrap()
                && query.covering(start).unwrap() == Some(vma)
                && other.range == vma.range
            {
                assert_eq!(other, vma);
                agreed += 1;
                kinds.push(vma.kind);
            }
            addr = vma.range.end();
        }
        assert!(agreed > 8, "{agreed}");
        for kind in [Kind::File, Kind::Stack, Kind::Heap, Kind::Special] {
            assert!(kinds.contains(&kind), "{kind:?} is missing from {kinds:?}");
        }
    }

    #[test]
    fn an_address_that_nothing_covers_has_a_next_mapping() {
        // Below vm.mmap_min_addr nothing can be mapped without privilege, and nothing is.
        for maps in both() {
            assert_eq!(maps.covering(PAGE_SIZE).unwrap(), None);
            let next = maps.covering_or_next(PAGE_SIZE).unwrap().unwrap();
            assert!(next.range.start() > PAGE_SIZE);
            assert_eq!(maps.covering_or_next(usize::MAX - 1).unwrap(), None);
        }
    }

    #[test]
    fn shared_memory_is_not_anonymous() {
        // SAFETY: a new mapping.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_SIZE,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        for maps in both() {
            let vma = maps.covering(at.addr()).unwrap().unwrap();
            assert!(vma.shared && !vma.writable && !vma.kind.is_anonymous());
        }
        // SAFETY: nobody uses it.
        unsafe { libc::munmap(at, PAGE_SIZE) };
    }

    #[test]
    fn a_file_with_a_long_path_is_a_file() {
        let name = "x".repeat(NAME_LEN);
        let name = std::ffi::CString::new(name).unwrap();
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: made just now, and nobody else knows it.
        let file = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(fd) };
        file.set_len(PAGE_SIZE as u64).unwrap();
        let private = libc::MAP_PRIVATE;
        let (prot, none) = (libc::PROT_READ, std::ptr::null_mut());
        // SAFETY: a new mapping.
        let at = unsafe { libc::mmap(none, PAGE_SIZE, prot, private, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        for maps in both() {
            let vma = maps.covering(at.addr()).unwrap().unwrap();
            assert_eq!((vma.kind, vma.shared), (Kind::File, false));
        }
        // SAFETY: nobody uses it.
        unsafe { libc::munmap(at, PAGE_SIZE) };
    }

    #[test]
    fn lines_are_parsed() {
        #[track_caller]
        fn check(line: &[u8], expected: Option<(usize, usize, &str, Kind)>) {
            let parsed = parse_line(line).map(|vma| {
                let letter = |is, letter| if is { letter } else { '-' };
                let perms: String = [
                    letter(vma.readable, 'r'),
                    letter(vma.writable, 'w'),
                    letter(vma.executable, 'x'),
                    if vma.shared { 's' } else { 'p' },
                ]
                .iter()
                .collect();
                (vma.range.start(), vma.range.end(), perms, vma.kind)
            });
            let expected = expected.map(|(s, e, perms, kind)| (s, e, perms.to_owned(), kind));
            assert_eq!(parsed, expected);
        }
        check(
            b"1000-3000 rw-p 00000000 00:00 0 ",
            Some((0x1000, 0x3000, "rw-p", Kind::Anonymous)),
        );
        check(
            b"1000-3000 r-xs 00001000 fe:01 77                  /a b/\xFF",
            Some((0x1000, 0x3000, "r-xs", Kind::File)),
        );
        check(
            b"1000-3000 rw-p 00000000 00:0f 9 /anon_hugepage (deleted)",
            Some((0x1000, 0x3000, "rw-p", Kind::Hugetlb)),
        );
        for (name, kind) in [
            ("[heap]", Kind::Heap),
            ("[stack]", Kind::Stack),
            ("[anon:arena 1]", Kind::Anonymous),
            ("[vdso]", Kind::Special),
        ] {
            let line = format!("1000-3000 ---p 00000000 00:00 0 {name}");
            check(line.as_bytes(), Some((0x1000, 0x3000, "---p", kind)));
        }
        check(b"", None);
        check(b"1000 rw-p", None);
        check(b"3000-1000 rw-p 00000000 00:00 0", None);
    }
}
