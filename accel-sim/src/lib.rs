//! A simulated accelerator on `svm`.
