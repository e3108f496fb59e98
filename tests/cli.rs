//! The commands of this package and the scripts, from outside: what they refuse, and how they say it. Nothing is run by them here.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

const STRESS: &str = env!("CARGO_BIN_EXE_stress");
const STORM: &str = env!("CARGO_BIN_EXE_storm");

fn output(command: &mut Command) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command
        .env_remove("CLICOLOR_FORCE")
        .output()
        .expect("the program starts");
    let text = |bytes| String::from_utf8(bytes).expect("the output is text");
    (status.code(), text(stdout), text(stderr))
}

#[test]
fn what_would_test_nothing_is_refused() {
    for (program, arguments, told) in [
        (
            STRESS,
            "--only nothing --seconds 1",
            "counters, pages, sessions, list, events",
        ),
        (STRESS, "--seconds 0", "more than 0"),
        (STRESS, "--seconds nan", "more than 0"),
        (STRESS, "--seconds 1e300", "ten years"),
        (STRESS, "--workers 0", "1..=256"),
        (STRESS, "--accelerators 0", "--accelerators"),
        (STRESS, "--sessions 1001", "--sessions"),
        (STRESS, "--shared-pages 7", "--shared-pages"),
        (STRESS, "--device-memory 0", "4096 or more"),
        (STRESS, "--granule 8k", "64k"),
        (STRESS, "--frob", "unexpected argument '--frob'"),
        (STORM, "--seconds 0", "more than 0"),
        (STORM, "--seconds=-1", "more than 0"),
        (STORM, "--arenas 0", "--arenas"),
        (STORM, "--pages 0", "--pages"),
        (STORM, "--device-memory 0", "--device-memory"),
        (STORM, "--delivery pigeon", "both"),
        (STORM, "--frob", "unexpected argument '--frob'"),
    ] {
        let words = arguments.split(' ');
        let (status, stdout, stderr) = output(Command::new(program).args(words));
        assert_eq!(status, Some(2), "{program} {arguments}: {stderr}");
        assert!(stderr.contains(told), "{program} {arguments}: {stderr}");
        assert_eq!(stdout, "", "{program} {arguments}");
    }
}

#[test]
fn help_says_what_they_do_and_what_is_usual() {
    for (program, usage, about) in [
        (
            STRESS,
            "Usage: stress [OPTIONS]",
            "fails if a write is lost",
        ),
        (STORM, "Usage: storm [OPTIONS]", "fails if anything is lost"),
    ] {
        let (status, stdout, stderr) = output(Command::new(program).arg("--help"));
        assert_eq!((status, &*stderr), (Some(0), ""));
        for text in [usage, about, "[default: 1]"] {
            assert!(stdout.contains(text), "{program}: {stdout}");
        }
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Makes a command that only fails. Two tests may at once: each has a file of its own, which takes the other's place as a whole.
fn write_script(path: &Path) {
    static NR: AtomicU32 = AtomicU32::new(0);
    let own = path.with_extension(NR.fetch_add(1, Relaxed).to_string());
    std::fs::write(&own, "#!/bin/sh\nexit 1\n").expect("a file for the test");
    std::fs::set_permissions(&own, Permissions::from_mode(0o755)).expect("it may be run");
    std::fs::rename(&own, path).expect("it has its name");
}

/// Runs a script of the workspace from elsewhere. Were it to go beyond its arguments, it would meet a cargo that only fails.
fn script(path: &str, arguments: &str) -> (Option<i32>, String, String) {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli-scripts");
    let stub = target.join("bin");
    std::fs::create_dir_all(&stub).expect("a directory for the test");
    write_script(&stub.join("cargo"));
    let usual = std::env::var("PATH").expect("there is a PATH");
    output(
        Command::new("bash")
            .arg(root().join(path))
            .args(arguments.split_whitespace())
            .current_dir("/")
            .env("CARGO_TARGET_DIR", target)
            .env("PATH", format!("{}:{usual}", stub.display())),
    )
}

#[test]
fn scripts_print_what_stands_at_their_head() {
    for (path, told) in [
        (".ci/run", "steps: tools fmt clippy "),
        ("benches/run.sh", "benches/run.sh --quick"),
    ] {
        for help in ["--help", "-h"] {
            let (status, stdout, stderr) = script(path, help);
            assert_eq!((status, &*stderr), (Some(0), ""), "{path} {help}");
            assert!(stdout.starts_with("All "), "{path} {help}: {stdout}");
            assert!(stdout.contains(told), "{path} {help}: {stdout}");
            assert!(!stdout.contains("set -e"), "{path} {help}: {stdout}");
        }
    }
}

#[test]
fn scripts_refuse_what_they_do_not_know_and_run_nothing() {
    for (path, arguments, told) in [
        (
            ".ci/run",
            "frob",
            "no such step: frob; there are: tools fmt ",
        ),
        (".ci/run", "fmt frob", "no such step: frob"),
        ("benches/run.sh", "--quik", "what is --quik?"),
        ("benches/run.sh", "--quick extra", "what is extra?"),
    ] {
        let (status, stdout, stderr) = script(path, arguments);
        assert_eq!((status, &*stdout), (Some(2), ""), "{path} {arguments}");
        assert!(stderr.contains(told), "{path} {arguments}: {stderr}");
    }
}

#[test]
fn results_outlast_a_build_that_fails() {
    let results = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli-scripts/bench-quick");
    std::fs::create_dir_all(&results).expect("a directory for the test");
    let old = results.join("protocol.json");
    std::fs::write(&old, "old").expect("a file for the test");
    let (status, stdout, _) = script("benches/run.sh", "--quick");
    assert_eq!((status, &*stdout), (Some(1), "==> building\n"));
    assert_eq!(std::fs::read_to_string(&old).expect("it is there"), "old");
}
