//! The examples are the flat files beside this one (see Cargo.toml). This library holds no code: it makes the program in the
//! README a test.

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
