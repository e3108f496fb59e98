//! The twins that go by system calls: what those find where a device has the pages, with a pin and without.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr;

use svm::{Capability, Delivery, Options};
use tests::mm::prot;

use crate::fixture::{each, error, migrated, temporary_file, whole};
use crate::map::{Map, WRITE, check, holds, init, load, mirror, store};
use crate::{PAGE, has};

/// Writes `len` bytes from `addr` to a new file and reads the file back: what a system call finds there.
fn through_a_file(addr: usize, len: usize) -> std::io::Result<Vec<u8>> {
    let file = std::fs::File::from(temporary_file(0));
    let bytes: *const u8 = ptr::with_exposed_provenance(addr);
    // SAFETY: the kernel reads the test's own mapping, or says that it cannot.
    let wrote = unsafe { libc::write(file.as_raw_fd(), bytes.cast(), len) };
    if wrote < 0 {
        return Err(std::io::Error::last_os_error());
    }
    assert_eq!(wrote, len as isize, "a short write");
    let mut found = vec![0; len];
    file.read_exact_at(&mut found, 0)?;
    Ok(found)
}

/// Whether the kernel's own accesses to pages that are away are served.
fn is_transparent(options: &Options) -> bool {
    options.delivery == Some(Delivery::Thread) && has(Capability::KernelFaults)
}

/// The kernel's has a page that its driver inserted, and takes a snapshot of it. Ours has a page of a file; and one that a device
/// holds, which system calls reach under a pin.
#[test]
fn mixedmap() {
    each("mixedmap", |f| {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"mixedmap".as_ptr(), libc::MFD_CLOEXEC) };
        // SAFETY: just opened.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: our own file.
        assert_eq!(unsafe { libc::ftruncate(fd.as_raw_fd(), PAGE as i64) }, 0);
        let map = Map::with(PAGE, WRITE, libc::MAP_PRIVATE, fd.as_raw_fd()).unwrap();
        assert_eq!(load(map.addr, 0), 0);
        assert_eq!(f.dev.snapshot(map.addr, 1).unwrap(), [prot::READ]);
        store(map.addr, 0, 1);
        assert_eq!(f.dev.snapshot(map.addr, 1).unwrap(), [prot::WRITE]);

        let map = Map::new(PAGE, WRITE);
        init(map.addr, PAGE, |k| k + 1);
        let mut out = vec![0; PAGE];
        let held = [prot::DEV_PRIVATE_LOCAL | prot::WRITE];
        assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(1));
        assert_eq!(f.dev.snapshot(map.addr, 1).unwrap(), held);
        match through_a_file(map.addr, PAGE) {
            Ok(found) => {
                assert!(is_transparent(&f.options), "{:?}", f.options);
                assert!(holds(&found, |k| k + 1));
                assert_eq!(f.dev.snapshot(map.addr, 1).unwrap(), [prot::WRITE]);
                assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(1));
            }
            Err(error) => {
                assert!(!is_transparent(&f.options), "{:?}: {error}", f.options);
                assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
                assert_eq!(f.dev.snapshot(map.addr, 1).unwrap(), held);
            }
        }
        let mirror = f.dev.mirror_of(map.addr, 1).unwrap();
        let pin = mirror.pin(..).unwrap();
        assert_eq!(f.dev.snapshot(map.addr, 1).unwrap(), [prot::WRITE]);
        assert!(holds(&through_a_file(map.addr, PAGE).unwrap(), |k| k + 1));
        drop(pin);
        assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(1));
        assert!(holds(&out, |k| k + 1));
        assert_eq!(f.dev.snapshot(map.addr, 1).unwrap(), held);
    });
}

/// Copies between `local` and the page at `addr` by `process_vm_readv`, or `process_vm_writev`.
fn by_process_vm(addr: usize, local: &mut [u8], writes: bool) {
    let here = libc::iovec {
        iov_base: local.as_mut_ptr().cast(),
        iov_len: local.len(),
    };
    let there = libc::iovec {
        iov_base: ptr::with_exposed_provenance_mut(addr),
        iov_len: local.len(),
    };
    // SAFETY: it has no preconditions.
    let pid = unsafe { libc::getpid() };
    let call = if writes {
        libc::process_vm_writev
    } else {
        libc::process_vm_readv
    };
    // SAFETY: `local` is the caller's, and the page at `addr` the test's own.
    let copied = unsafe { call(pid, &raw const here, 1, &raw const there, 1, 0) };
    let error = std::io::Error::last_os_error();
    assert_eq!(copied, local.len() as isize, "{error}");
}

/// What `get_user_pages` is to the kernel's, system calls under a pin are here: one way for each page, and only that page comes
/// home for it.
#[test]
fn hmm_gup_test() {
    each("hmm_gup_test", |f| {
        const HELD: u8 = prot::DEV_PRIVATE_LOCAL | prot::WRITE;
        let map = Map::new(4 * PAGE, WRITE);
        let ints_per_page = PAGE as i32 / 4;
        (0..4).for_each(|page| init(map.page(page), PAGE, |k| k + page as i32 * ints_per_page));
        let contents = |page: i32| move |k: i32| k + page * ints_per_page;
        let mut out = vec![0; 4 * PAGE];
        assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(4));
        let mirror = f.dev.mirror_of(map.addr, 4).unwrap();
        let pinned = |page: usize| mirror.pin(page * PAGE..(page + 1) * PAGE).unwrap();
        let snapshot = || f.dev.snapshot(map.addr, 4).unwrap();
        assert_eq!(snapshot(), [HELD; 4]);

        // write(2) of a page; and of what the device writes to it in place, while it is pinned.
        let pin = pinned(0);
        assert_eq!(snapshot(), [prot::WRITE, HELD, HELD, HELD]);
        assert!(holds(&through_a_file(map.addr, PAGE).unwrap(), contents(0)));
        let by_device = self::mirror(PAGE, |k| k + 7);
        assert_eq!(f.dev.write(map.addr, &by_device), whole(1));
        assert!(holds(&through_a_file(map.addr, PAGE).unwrap(), |k| k + 7));
        assert_eq!(
            f.dev.migrate_to_dev(map.addr, &mut out[..PAGE]),
            error(libc::ENOENT),
            "a pinned page does not migrate"
        );
        assert_eq!(snapshot(), [prot::WRITE, HELD, HELD, HELD]);
        drop(pin);

        // process_vm_readv and process_vm_writev.
        let pin = pinned(1);
        let mut copy = vec![0; PAGE];
        by_process_vm(map.page(1), &mut copy, false);
        assert!(holds(&copy, contents(1)));
        let mut copy = self::mirror(PAGE, |k| -k);
        by_process_vm(map.page(1), &mut copy, true);
        assert!(check(map.page(1), PAGE, |k| -k));
        drop(pin);

        // read(2) into a page; the device sees it in place, and takes it along afterwards.
        let pin = pinned(2);
        let file = std::fs::File::from(temporary_file(PAGE));
        file.write_all_at(&self::mirror(PAGE, |k| k * 3), 0)
            .unwrap();
        let into = ptr::with_exposed_provenance_mut::<u8>(map.page(2));
        // SAFETY: the kernel writes the test's own page, which is home while it is pinned.
        let read = unsafe { libc::read(file.as_raw_fd(), into.cast(), PAGE) };
        assert_eq!(read, PAGE as isize, "{}", std::io::Error::last_os_error());
        assert_eq!(f.dev.read(map.page(2), &mut copy), whole(1));
        assert!(holds(&copy, |k| k * 3));
        drop(pin);

        // As long as anybody likes: nothing the device does takes the page.
        let pin = pinned(3);
        assert_eq!(snapshot()[3], prot::WRITE);
        assert_eq!(f.dev.read(map.page(3), &mut copy), whole(1));
        assert!(holds(&copy, contents(3)));
        assert_eq!(
            f.dev.migrate_to_dev(map.addr, &mut out),
            error(libc::ENOENT)
        );
        assert_eq!(snapshot(), [HELD, HELD, HELD, prot::WRITE]);
        drop(pin);

        assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(4));
        assert!(holds(&out[..PAGE], |k| k + 7));
        assert!(check(map.addr, PAGE, |k| k + 7));
        assert!(check(map.page(1), PAGE, |k| -k));
        assert!(check(map.page(2), PAGE, |k| k * 3));
        assert!(check(map.page(3), PAGE, contents(3)));
    });
}
