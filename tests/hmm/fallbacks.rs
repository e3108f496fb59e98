//! This whole suite again under each forced fallback: both doors each, but for the inline one where there is no SIGBUS delivery.

use std::time::Duration;

use tests::Watchdog;

/// A process for each, since what is forced is read once.
fn without(words: &str) {
    if std::env::var_os("SVM_DISABLE").is_some() {
        return;
    }
    let _watchdog = Watchdog::with_timeout("hmm under a fallback", Duration::from_secs(300));
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command
        .env("SVM_DISABLE", words)
        .args(["--skip", "fallbacks::"]);
    let out = command.output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(
        out.status.success() && said.contains("test result: ok."),
        "SVM_DISABLE={words}:\n{said}{}",
        String::from_utf8_lossy(&out.stderr)
    );
}

macro_rules! fallbacks {
    ($($name:ident: $words:literal,)*) => {
        $(#[test] fn $name() { without($words) })*
    };
}

fallbacks! {
    no_move: "move",
    no_events: "events",
    no_sigbus: "sigbus",
    no_kernel_faults: "kernel_faults",
    no_poison: "poison",
    no_wp_async: "wp_async",
    no_membarrier: "membarrier",
    no_process_vm: "process_vm",
    no_pagemap_scan: "pagemap_scan",
    no_procmap_query: "procmap_query",
    no_details: "thread_id,exact_address",
    nothing_of_later_kernels: "move,wp_async,poison,events,pagemap_scan,procmap_query,membarrier,process_vm",
}
