//! Switches the points on: for this package, hence for nobody who depends on `svm`.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cfg=svm_points");
}
