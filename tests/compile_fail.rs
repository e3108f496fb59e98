//! Programs that must not compile, each for the reason that its first line gives. What the compiler says is in the `.stderr`
//! file beside it, as the toolchain of `rust-version` words it; `TRYBUILD=overwrite` renews them.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Builds `svm` and `accel-sim` once more, in a target directory of its own.
#[test]
fn racy_programs_do_not_compile() {
    let cases = trybuild::TestCases::new();
    if rustc_version().starts_with(env!("CARGO_PKG_RUST_VERSION")) {
        cases.compile_fail("compile_fail/*.rs");
    } else {
        // Another compiler has other words. So its words are taken as they are, for a copy: the programs must still be refused.
        println!(
            "not {}: messages are not compared",
            env!("CARGO_PKG_RUST_VERSION")
        );
        // SAFETY: the only test of this process; nobody else reads the environment before it is dropped with `cases`.
        unsafe { env::set_var("TRYBUILD", "overwrite") };
        let copy = Path::new(env!("CARGO_TARGET_TMPDIR")).join("compile_fail");
        fs::create_dir_all(&copy).expect("a directory for the copies");
        for entry in fs::read_dir("compile_fail").expect("the programs") {
            let path = entry.expect("a program").path();
            if path.extension().is_some_and(|e| e == "rs") {
                fs::copy(&path, copy.join(path.file_name().expect("a file"))).expect("a copy");
            }
        }
        cases.compile_fail(copy.join("*.rs"));
    }
}

fn rustc_version() -> String {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        .arg("--version")
        .output()
        .expect("rustc runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.trim_start_matches("rustc ").to_owned()
}
