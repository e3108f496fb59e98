//! Programs that must not compile, each for the reason that its first line gives. What the compiler says is in the `.stderr`
//! file beside it, for the toolchain that CI pins; `TRYBUILD=overwrite` renews them.

/// Runs in its own target directory, and so builds `svm` and `accel-sim` once more.
#[test]
fn racy_programs_do_not_compile() {
    trybuild::TestCases::new().compile_fail("compile_fail/*.rs");
}
