//! Contents that are lost, for somebody has emptied a device's memory: whoever touches such a page is told, in every process and by
//! either door, and nobody reads a zero or waits for ever.

#![cfg(target_os = "linux")]

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::ptr;
use std::time::{Duration, Instant};

use svm::{Access, Capabilities, Capability, Delivery, ErrorKind, Options};
use tests::idle::{Idle, fault_in};
use tests::{Map, Watchdog, usable};

const PAGE: usize = 4096;
const MARK: &str = "SVM_TEST_LOST";
/// Said by a process that has found everything but the lost page.
const WELL: &str = "all others are well";

/// How a process ended, and what it wrote to standard error.
struct Ended {
    status: ExitStatus,
    said: String,
}

/// Runs `test` again, in a process of its own which is to die, with these words of `SVM_DISABLE`.
fn dies(test: &str, delivery: &str, lacking: &str) -> Ended {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(MARK, delivery)
        .env("SVM_DISABLE", lacking)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(20) {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{test}, {delivery} without {lacking:?}: no end: the access waits for ever");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut said = String::new();
    let mut stderr = child.stderr.take().unwrap();
    stderr.read_to_string(&mut said).unwrap();
    Ended {
        status: child.wait().unwrap(),
        said,
    }
}

/// Has each door and kernel that there is meet the body, in processes of their own.
fn each_dies(test: &'static str, body: fn(&Options)) {
    let _watchdog = Watchdog::new(test);
    match std::env::var(MARK).as_deref() {
        Ok("inline") => return body(&Options::new().delivery(Delivery::Inline)),
        Ok(_) => return body(&Options::new().delivery(Delivery::Thread)),
        Err(_) => {}
    }
    if !usable() {
        return;
    }
    let can_poison = Capabilities::probe().has(Capability::Poison);
    for (delivery, lacking) in [
        ("inline", ""),
        ("inline", "poison"),
        ("thread", ""),
        ("thread", "poison"),
        ("thread", "poison,thread_id"),
        ("inline", "move"),
        ("thread", "move,poison,kernel_faults"),
    ] {
        let ended = dies(test, delivery, lacking);
        let Ended { status, said } = &ended;
        if delivery == "inline" || (can_poison && lacking.is_empty()) {
            assert_eq!(status.signal(), Some(libc::SIGBUS), "{delivery}: {said}");
        } else {
            assert_eq!(status.signal(), Some(libc::SIGABRT), "{lacking}: {said}");
            let line = said.lines().find(|line| line.starts_with("svm: "));
            let line = line.unwrap_or_else(|| panic!("no message: {said}"));
            assert!(line.contains("cannot be served"), "{line}");
        }
        assert!(
            said.contains(WELL),
            "{delivery} without {lacking}: it ended before it touched what is lost: {said}"
        );
        assert!(
            !said.contains("panicked"),
            "{delivery} without {lacking}: {said}"
        );
    }
}

/// A mapping of 16 pages whose third is lost: a device had them all, and somebody has emptied a page of its memory.
fn lose(options: &Options) -> (Map, svm::Mirror<'static, u8>, svm::Attachment<Idle>) {
    let map = Map::new(16);
    let mirror = map.mirror(options);
    let device = Idle::attach().unwrap();
    let mapped = device.map(mirror.view().region()).unwrap();
    let first = (map.addr - mapped.region().base()) / PAGE;
    let mut range = device.range().unwrap();
    fault_in(&mut range, &mapped, first..first + 16, Access::Write).unwrap();
    let frame = map.at(2).addr().wrapping_add_signed(mapped.offset());
    let frame = ptr::with_exposed_provenance_mut(frame);
    // SAFETY: a page of the window, which holds what this test gives up.
    let emptied = unsafe { libc::madvise(frame, PAGE, libc::MADV_DONTNEED) };
    assert_eq!(emptied, 0);
    drop((range, mapped));
    (map, mirror, device)
}

#[test]
fn a_touch_of_a_lost_page_ends_the_process() {
    each_dies("a_touch_of_a_lost_page_ends_the_process", |options| {
        let (map, mirror, device) = lose(options);
        // Behind it first: on their way home they meet the page that is lost.
        for page in [3, 15, 1, 0, 7] {
            assert_eq!(
                map.read(page),
                page as u64 + 1,
                "its neighbours are not lost"
            );
        }
        eprintln!("{WELL}");
        let value = map.read(2);
        panic!("read {value} of a page that is lost, {mirror:?} {device:?}");
    });
}

#[test]
fn a_mirror_that_cannot_be_closed_says_so_and_keeps_the_page_out_of_reach() {
    let test = "a_mirror_that_cannot_be_closed_says_so_and_keeps_the_page_out_of_reach";
    each_dies(test, |options| {
        let (map, mirror, device) = lose(options);
        let error = mirror.close().unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Lost, "{error}");
        assert_eq!(error.addr(), Some(map.at(2).addr()), "{error}");
        assert!(error.to_string().contains("SIGBUS"), "{error}");
        drop(device);
        (0..16)
            .filter(|&page| page != 2)
            .for_each(|page| assert_eq!(map.read(page), page as u64 + 1));
        eprintln!("{WELL}");
        panic!("read {} of a page that is lost", map.read(2));
    });
}
