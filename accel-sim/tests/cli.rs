//! The `accel-sim` binary from outside: exit status, standard output, standard error.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

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
    let mut child = Command::new(env!("CARGO_BIN_EXE_accel-sim"))
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
        "run list --granule 8k",
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
