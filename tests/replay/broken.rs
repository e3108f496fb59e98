//! The replay can fail: with a rule of the protocol taken away, cells of the table come out otherwise.
//!
//! Each rule is broken in a process of its own, since what follows may be anything: a stale read, a lost write, a crash, a hang.
//! What is counted are the cells that say so, up to the moment at which the process ends or is ended.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use svm::point::Rule;

/// Names the rule that a child breaks.
const BREAK: &str = "SVM_REPLAY_BREAK";

/// Whether this process plays with a broken rule.
pub(crate) fn is_anything() -> bool {
    std::env::var_os(BREAK).is_some()
}

/// Breaks the rule that the environment names, if it does.
pub(crate) fn break_what_is_asked_for() {
    if let Ok(name) = std::env::var(BREAK) {
        let rule = Rule::ALL.iter().find(|rule| format!("{rule:?}") == name);
        svm::point::break_rule(*rule.expect("a rule"));
    }
}

/// The cells that go wrong in a child that plays `tests` with `rule` broken.
fn wrong_cells(rule: Rule, tests: &str) -> Vec<String> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([tests, "--nocapture", "--test-threads=1"])
        .env(BREAK, format!("{rule:?}"))
        .env("RUST_BACKTRACE", "0")
        .env_remove("SVM_REPLAY_CELL")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut pipe = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut out = Vec::new();
        let _ = pipe.read_to_end(&mut out);
        String::from_utf8_lossy(&out).into_owned()
    });
    let deadline = Instant::now() + Duration::from_secs(45);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let lines = reader.join().unwrap();
    let after = |what| lines.lines().filter_map(move |line| line.split_once(what));
    let mut wrong: Vec<String> = after("WRONG ").map(|(_, cell)| cell.to_owned()).collect();
    if let (Some(signal), Some((_, cell))) = (status.signal(), after("PLAYS ").next_back()) {
        let how = if signal == libc::SIGKILL {
            "hung"
        } else {
            "died"
        };
        wrong.push(format!("{cell}: the process {how}"));
    }
    wrong
}

#[test]
fn every_broken_rule_shows() {
    let _watchdog = crate::watch("broken rules");
    if is_anything() || !crate::usable() {
        return;
    }
    let mut unseen = Vec::new();
    for &rule in Rule::ALL {
        let mut wrong = Vec::new();
        for tests in [
            "drivers_reads",
            "drivers_writes",
            "rounds_reads",
            "rounds_writes",
        ] {
            wrong = wrong_cells(rule, tests);
            if !wrong.is_empty() {
                break;
            }
        }
        println!("{rule:?} broken: {} cells", wrong.len());
        wrong.iter().for_each(|cell| println!("    {cell}"));
        if wrong.is_empty() {
            unseen.push(rule);
        }
    }
    assert!(unseen.is_empty(), "broken without a trace: {unseen:?}");
}
