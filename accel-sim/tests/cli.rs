//! The `accel-sim` binary from outside: exit status, standard output, standard error.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

#[path = "../../tests/seccomp.rs"]
mod seccomp;

/// No run here may take longer: a hang is a failure, not a timeout of the whole suite.
const DEADLINE: Duration = Duration::from_secs(60);

/// What a run left behind.
struct Outcome {
    /// `None` if a signal ended it.
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Runs the binary with arguments separated by blanks, in `dir`.
fn accel_sim(dir: &Path, arguments: &str) -> Outcome {
    accel_sim_without(dir, "", arguments)
}

/// The same, on a kernel that is made to lack something.
fn accel_sim_without(dir: &Path, disabled: &str, arguments: &str) -> Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_accel-sim"));
    if !disabled.is_empty() {
        command.env("SVM_DISABLE", disabled);
    }
    outcome(command, dir, arguments)
}

/// The same, where a container's filter answers to the system call userfaultfd, and to the device's ioctl, with `errno`.
fn accel_sim_filtered(dir: &Path, errno: i32, arguments: &str) -> Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_accel-sim"));
    let filter = seccomp::Filter {
        syscall: Some(errno),
        user_mode_only: None,
        device: Some(errno),
    };
    // SAFETY: the filter is installed by two system calls, without memory.
    unsafe { command.pre_exec(move || filter.install()) };
    outcome(command, dir, arguments)
}

fn outcome(mut command: Command, dir: &Path, arguments: &str) -> Outcome {
    let mut child = command
        .args(arguments.split(' '))
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    // Drained on the side, so that a full pipe is no reason to miss the deadline.
    let stdout = child
        .stdout
        .take()
        .map(|pipe| thread::spawn(|| io::read_to_string(pipe)));
    let stderr = child
        .stderr
        .take()
        .map(|pipe| thread::spawn(|| io::read_to_string(pipe)));
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("the binary can be waited for") {
            break status;
        }
        if start.elapsed() > DEADLINE {
            child.kill().expect("the binary can be killed");
            child.wait().expect("the binary can be waited for");
            panic!("`accel-sim {arguments}` still ran after {DEADLINE:?}");
        }
        thread::sleep(Duration::from_millis(5));
    };
    let text = |reader: Option<thread::JoinHandle<io::Result<String>>>| {
        let reader = reader.expect("the pipe was asked for");
        reader
            .join()
            .expect("the reader lives")
            .expect("the output is text")
    };
    Outcome {
        status: status.code(),
        stdout: text(stdout),
        stderr: text(stderr),
    }
}

/// A directory of files for one test, gone when it ends.
struct Files(PathBuf);

impl Files {
    fn new(test: &str, files: &[(&str, &str)]) -> Files {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cli-{test}"));
        // What an earlier run that was killed left behind.
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).expect("a directory for the test");
        for (name, contents) in files {
            fs::write(dir.join(name), contents).expect("a file for the test");
        }
        Files(dir)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn bad_input_is_named_by_file_and_line_and_exits_2() {
    let header = "%%MatrixMarket matrix coordinate pattern general\n";
    let short = format!("{header}2 2 2\n1 2\n");
    let outside = format!("{header}2 2 1\n1 3\n");
    let files = Files::new(
        "bad-input",
        &[
            ("short.mtx", &short),
            ("outside.mtx", &outside),
            ("bad.el", "1 2\n2 three\n"),
            ("empty.el", "# no edges\n"),
            (
                "bad.lock",
                "[[package]]\nname = \"a\"\nversion = \"1.0.0\"\ndependencies = [\"b\"]\n",
            ),
            ("graph.dot", "digraph { a -> b }\n"),
        ],
    );
    fs::create_dir(files.0.join("dir.el")).expect("a directory for the test");
    fs::write(files.0.join("latin.lock"), b"# a\n# \xe9\n").expect("a file for the test");
    for (arguments, complaint) in [
        (
            "--input short.mtx",
            "short.mtx:3: the file ends after 1 of the 2 entries announced",
        ),
        (
            "--input outside.mtx",
            "outside.mtx:3: a column number 3 is outside 1..=2",
        ),
        (
            "--input bad.el",
            "bad.el:2: expected a second node id, found 'three'",
        ),
        ("--input empty.el", "empty.el:1: no edges"),
        (
            "--input bad.lock",
            "bad.lock:4: dependency 'b' names no package of this file",
        ),
        (
            "--input graph.dot",
            "graph.dot: unknown format; known are Cargo.lock",
        ),
        (
            "--input graph.dot --format edge-list",
            "graph.dot:1: expected a node id, found 'digraph'",
        ),
        (
            "--input missing.el",
            "missing.el: No such file or directory",
        ),
        ("--input dir.el", "dir.el: Is a directory"),
        ("--input latin.lock", "latin.lock:2: not UTF-8"),
        (
            "--rmat 3 --tolerance 0.9 --damping 0.99",
            "--tolerance 0.9 with --damping 0.99: ranks that sum to 1 could differ by",
        ),
    ] {
        let Outcome {
            status,
            stdout,
            stderr,
        } = accel_sim(&files.0, &format!("run pagerank {arguments}"));
        assert_eq!(status, Some(2), "{arguments}: {stderr}");
        assert!(
            stderr.starts_with(&format!("accel-sim: {complaint}")),
            "{arguments}: {stderr}"
        );
        assert_eq!(stderr.lines().count(), 1, "{arguments}: {stderr}");
        assert_eq!(stdout, "", "{arguments}");
    }
}

#[test]
fn a_bad_command_line_exits_2_and_runs_nothing() {
    let files = Files::new("bad-command-line", &[]);
    for arguments in [
        "run",
        "run fibonacci",
        "run pagerank --rmat 3 --input a.el",
        "run pagerank --rmat 99",
        "run pagerank --damping 1",
        "run pagerank --device-memory lots",
        "run saxpy --n 0",
        "run list --n 4G",
        "run list --granule 8k",
        "run list --workers 0",
        "run list --workers 257",
        "run list --device-memory 0",
        "run list --device-memory 4095",
    ] {
        let Outcome {
            status,
            stdout,
            stderr,
        } = accel_sim(&files.0, arguments);
        assert_eq!(status, Some(2), "{arguments}: {stderr}");
        assert!(
            stderr.starts_with("error: ") || stderr.contains("Usage:"),
            "{arguments}: {stderr}"
        );
        assert_eq!(stdout, "", "{arguments}");
    }
}

#[test]
fn help_says_what_can_be_asked() {
    let files = Files::new("help", &[]);
    let Outcome { status, stdout, .. } = accel_sim(&files.0, "run pagerank --help");
    assert_eq!(status, Some(0));
    for option in [
        "--input",
        "--rmat",
        "--json",
        "--workers",
        "--device-memory",
        "--delivery",
        "--granule",
        "--seed",
    ] {
        assert!(stdout.contains(option), "{option} is missing in:\n{stdout}");
    }
}

/// A graph in each format, the highest rank first: everything points at `hub`.
const LOCKFILE: &str = r#"
version = 4

[[package]]
name = "hub"
version = "1.0.0"

[[package]]
name = "left"
version = "0.2.0"
dependencies = ["hub"]

[[package]]
name = "right"
version = "0.3.0"
dependencies = ["hub", "left"]
"#;
const MATRIX: &str = "%%MatrixMarket matrix coordinate pattern general\n3 3 3\n2 1\n3 1\n3 2\n";
const EDGES: &str = "# a star\n20 10\n30,10\n30 20 0.5\n";

/// Asserts that a run is verified, quiet, and says so in its last line; returns its report.
fn verified(files: &Files, arguments: &str) -> String {
    let Outcome {
        status,
        stdout,
        stderr,
    } = accel_sim(&files.0, arguments);
    assert_eq!(status, Some(0), "{arguments}: {stderr}\n{stdout}");
    assert_eq!(
        stdout.lines().last(),
        Some("verified"),
        "{arguments}:\n{stdout}"
    );
    assert_eq!(stderr, "", "{arguments}: not quiet on a pipe");
    assert!(!stdout.contains('\u{1b}'), "{arguments}: escapes on a pipe");
    stdout
}

#[test]
fn every_graph_format_is_ranked_and_verified() {
    let files = Files::new(
        "formats",
        &[
            ("Cargo.lock", LOCKFILE),
            ("star.mtx", MATRIX),
            ("star.el", EDGES),
        ],
    );
    for (arguments, top) in [
        ("--input Cargo.lock", "hub 1.0.0"),
        ("--input star.mtx", "1"),
        ("--input star.el", "10"),
    ] {
        let report = verified(&files, &format!("run pagerank {arguments}"));
        let mut lines = report.lines().skip_while(|line| *line != "Highest ranks:");
        let first = lines.nth(2).expect("a first rank");
        let name = first.trim().strip_prefix('1').expect("place 1").trim();
        assert!(
            name.starts_with(&format!("{top} ")),
            "{arguments}:\n{report}"
        );
    }
}

#[test]
fn every_way_to_run_is_verified() {
    let files = Files::new("ways", &[]);
    for arguments in [
        "run pagerank --rmat 10",
        "run pagerank --rmat 10 --workers 1 --granule 4k",
        "run pagerank --rmat 10 --workers 4 --granule 2m",
        "run pagerank --rmat 10 --delivery thread",
        "run pagerank --rmat 0",
        "run pagerank --rmat 4 --iterations 1 --damping 0.5 --seed 9",
        "run saxpy --n 100000",
        "run saxpy --n 64K",
        "run saxpy --n 5000 --delivery thread --granule 4k",
        "run list --n 5000",
        "run list --n 1",
    ] {
        verified(&files, arguments);
    }
}

#[test]
fn a_working_set_larger_than_device_memory_is_evicted_and_verified() {
    let files = Files::new("evict", &[]);
    // 32 MiB of y and x.
    let arguments = "run saxpy --n 4194304 --workers 2 --device-memory 16M --json report.json";
    let report = verified(&files, arguments);
    let json = fs::read_to_string(files.0.join("report.json")).expect("the report");
    let json: serde_json::Value = serde_json::from_str(&json).expect("a report in JSON");
    let evicted = &json["counters"]["to_host"]["pages_by_cause"]["evict"];
    assert!(evicted.as_u64() > Some(0), "nothing was evicted:\n{report}");
}

/// Neither the report of a run before it, nor, should it have the same name, the input.
#[test]
fn what_cannot_be_run_leaves_the_json_file_as_it_was() {
    let files = Files::new("json-kept", &[("report.json", "before")]);
    for arguments in [
        "run pagerank --input missing.txt --json report.json",
        "run pagerank --input report.json --json report.json",
        "run saxpy --n 100 --json report.json",
    ] {
        let outcome = accel_sim(&files.0, arguments);
        assert_eq!(outcome.status, Some(2), "{arguments}: {}", outcome.stderr);
        let kept = fs::read_to_string(files.0.join("report.json")).expect("the file");
        assert_eq!(kept, "before", "{arguments}");
    }
}

#[test]
fn the_json_report_agrees_with_the_exit_status() {
    let files = Files::new("json", &[("Cargo.lock", LOCKFILE)]);
    verified(
        &files,
        "run pagerank --input Cargo.lock --json report.json --top 2",
    );
    let json = fs::read_to_string(files.0.join("report.json")).expect("the report");
    let json: serde_json::Value = serde_json::from_str(&json).expect("a report in JSON");
    assert_eq!(json["verified"], true);
    assert_eq!(json["input"]["sizes"]["packages"], 3);
    assert_eq!(json["top"][0]["name"], "hub 1.0.0");
    assert_eq!(json["top"].as_array().map(Vec::len), Some(2));
    for way in ["to_device", "to_host"] {
        let migrations = &json["counters"][way];
        let (runs, pages) = (migrations["runs"].as_u64(), migrations["pages"].as_u64());
        assert!(runs > Some(0) && runs <= pages, "{way}: {migrations}");
    }
}

#[test]
fn json_may_go_to_standard_output_alone() {
    let files = Files::new("json-stdout", &[]);
    let Outcome {
        status,
        stdout,
        stderr,
    } = accel_sim(&files.0, "run list --n 1K --json -");
    assert_eq!(status, Some(0), "{stderr}");
    let json: serde_json::Value = serde_json::from_str(&stdout).expect("nothing but JSON");
    assert_eq!(json["input"]["sizes"]["nodes"], 1024);
    assert_eq!(stderr.lines().last(), Some("verified"), "{stderr}");
}

#[test]
fn what_cannot_be_written_or_held_exits_2() {
    let files = Files::new("refused", &[]);
    fs::create_dir(files.0.join("dir")).expect("a directory for the test");
    for (arguments, complaint) in [
        (
            // So large that it would be refused, were it looked at before the file is.
            "run list --n 4294967295 --json missing/report.json",
            "cannot write missing/report.json: No such file or directory",
        ),
        ("run list --json dir", "cannot write dir: Is a directory"),
        (
            "run saxpy --n 64K --workers 2 --device-memory 4K",
            "the workers' spans need ",
        ),
    ] {
        let Outcome {
            status,
            stdout,
            stderr,
        } = accel_sim(&files.0, arguments);
        assert_eq!(status, Some(2), "{arguments}: {stderr}");
        assert!(
            stderr.starts_with(&format!("accel-sim: {complaint}")),
            "{arguments}: {stderr}"
        );
        assert_eq!(stderr.lines().count(), 1, "{arguments}: {stderr}");
        assert_eq!(stdout, "", "{arguments}");
    }
}

#[test]
fn doctor_says_what_there_is_and_is_not() {
    let files = Files::new("doctor", &[]);
    let well = accel_sim(&files.0, "doctor");
    assert_eq!(well.status, Some(0), "{}{}", well.stdout, well.stderr);
    assert!(well.stdout.contains("userfaultfd"), "{}", well.stdout);
    assert!(
        well.stdout.ends_with("memory can be mirrored here\n"),
        "{}",
        well.stdout
    );

    let ill = accel_sim_without(&files.0, "userfaultfd", "doctor");
    assert_eq!(ill.status, Some(1), "{}{}", ill.stdout, ill.stderr);
    assert!(
        ill.stdout.contains("mirroring is refused"),
        "{}",
        ill.stdout
    );
    let run = accel_sim_without(&files.0, "userfaultfd", "run list --n 10");
    assert_eq!(run.status, Some(1), "{}", run.stdout);
    assert!(run.stderr.contains("userfaultfd"), "{}", run.stderr);
}

#[test]
fn where_a_filter_forbids_it_both_say_what_would_help() {
    let files = Files::new("filtered", &[]);
    for (errno, names) in [
        (
            libc::EPERM,
            ["CAP_SYS_PTRACE", "vm.unprivileged_userfaultfd"],
        ),
        (
            libc::ENOSYS,
            ["CONFIG_USERFAULTFD", "system call userfaultfd"],
        ),
    ] {
        let doctor = accel_sim_filtered(&files.0, errno, "doctor");
        assert_eq!(doctor.status, Some(1), "{}{}", doctor.stdout, doctor.stderr);
        let verdict = "memory can NOT be mirrored here\n";
        assert!(doctor.stdout.ends_with(verdict), "{}", doctor.stdout);
        let run = accel_sim_filtered(&files.0, errno, "run list --n 10");
        assert_eq!(run.status, Some(1), "{}{}", run.stdout, run.stderr);
        for text in [&doctor.stdout, &run.stderr] {
            let device = ["seccomp", "profile", "/dev/userfaultfd", "setfacl"];
            for name in device.iter().chain(&names) {
                assert!(text.contains(name), "no word of {name}: {text}");
            }
        }
    }
    let without = accel_sim_without(&files.0, "wp", "doctor");
    assert_eq!(without.status, Some(1), "{}", without.stdout);
    let verdict = "memory can NOT be mirrored here\n";
    assert!(without.stdout.ends_with(verdict), "{}", without.stdout);
}
