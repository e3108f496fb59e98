//! The programs of this package from outside: what they refuse, and how they say it.

use std::process::Command;

/// Asserts that a program ends with `status`, on standard error with text that has each of `told` in it, without a trace.
fn fails(program: &str, arguments: &str, status: i32, told: &[&str]) {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .env("RUST_BACKTRACE", "1")
        .env_remove("CLICOLOR_FORCE")
        .output()
        .expect("the program starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{arguments}: {stderr}");
    assert!(stderr.starts_with("error: "), "{arguments}: {stderr}");
    assert!(!stderr.contains("backtrace"), "{arguments}: {stderr}");
    for text in told {
        assert!(
            stderr.contains(text),
            "{arguments}: no {text:?} in {stderr}"
        );
    }
}

fn help(program: &str) -> String {
    let output = Command::new(program)
        .arg("--help")
        .env_remove("CLICOLOR_FORCE")
        .output();
    let output = output.expect("the program starts");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn soak_refuses_what_would_tell_nothing() {
    let soak = env!("CARGO_BIN_EXE_soak");
    for (arguments, told) in [
        ("--seconds 18446744073709551615", "--seconds"),
        ("--seconds 0", "--seconds"),
        ("--seconds 6 --every 0", "--every"),
        ("--seconds 6", "too short to tell, 3 lines are needed"),
        ("--seconds 60 --every 30", "too short to tell"),
        ("--frob", "--frob"),
    ] {
        fails(soak, arguments, 2, &[told]);
    }
    let help = help(soak);
    assert!(
        help.starts_with("Does everything that mirrors do"),
        "{help}"
    );
    assert!(help.contains("Usage: soak [OPTIONS]"), "{help}");
    let defaults = ["[default: 3600]", "[default: a twentieth of --seconds"];
    assert!(defaults.iter().all(|text| help.contains(text)), "{help}");
}

#[test]
fn report_says_what_it_cannot_read() {
    let report = env!("CARGO_BIN_EXE_report");
    fails(report, "missing", 1, &["missing is not a directory\n"]);
    let dir = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli-report");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("a directory for the test");
    let run = dir.to_str().expect("a path without surprises");
    fails(report, run, 1, &["no results in "]);
    std::fs::write(dir.join("protocol.json"), "{").expect("a file for the test");
    fails(report, run, 1, &["protocol.json: EOF while parsing"]);
    std::fs::remove_dir_all(&dir).expect("it was there");
    assert!(help(report).starts_with("Turns the JSON of a run"));
}
