//! The stress for a second or less: through each door, with each granule, and without what an older kernel or a stricter
//! container lacks. Each run is a process of its own, for what is disabled is read once.

use std::process::Command;

use tests::{Watchdog, usable};

/// Runs the stress, and fails with what it printed if something was lost.
fn stress(disabled: &str, args: &[&str]) {
    run(env!("CARGO_BIN_EXE_stress"), disabled, args);
}

fn run(program: &str, disabled: &str, args: &[&str]) {
    let mut command = Command::new(program);
    let output = command
        .args(args)
        .env("SVM_DISABLE", disabled)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "SVM_DISABLE={disabled} {program} {}: {}\n{}{}",
        args.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
}

#[test]
fn each_door_and_granule() {
    let _watchdog = Watchdog::new("each door and granule");
    if !usable() {
        return;
    }
    for delivery in ["inline", "thread"] {
        for granule in ["4k", "64k", "2m"] {
            stress(
                "",
                &[
                    "--seconds",
                    "1",
                    "--delivery",
                    delivery,
                    "--granule",
                    granule,
                ],
            );
        }
    }
}

#[test]
fn each_door_and_granule_without_move() {
    let _watchdog = Watchdog::new("without move");
    if !usable() {
        return;
    }
    for delivery in ["inline", "thread"] {
        for granule in ["4k", "64k", "2m"] {
            stress(
                "move",
                &[
                    "--seconds",
                    "1",
                    "--delivery",
                    delivery,
                    "--granule",
                    granule,
                ],
            );
        }
    }
}

#[test]
fn little_device_memory() {
    let _watchdog = Watchdog::new("little device memory");
    if !usable() {
        return;
    }
    for disabled in ["", "move"] {
        for delivery in ["inline", "thread"] {
            stress(
                disabled,
                &[
                    "--seconds",
                    "1",
                    "--delivery",
                    delivery,
                    "--device-memory",
                    "786432",
                    "--seed",
                    "2",
                ],
            );
        }
    }
}

#[test]
fn each_fallback() {
    let _watchdog = Watchdog::new("each fallback");
    if !usable() {
        return;
    }
    for disabled in [
        "wp_async",
        "poison",
        "events",
        "pagemap_scan",
        "procmap_query",
        "membarrier",
        "process_vm",
        "kernel_faults,thread_id,exact_address",
        "move,wp_async,poison,events,pagemap_scan,procmap_query,membarrier,process_vm",
    ] {
        for delivery in ["inline", "thread"] {
            stress(
                disabled,
                &["--seconds", "0.5", "--delivery", delivery, "--seed", "3"],
            );
        }
    }
    // Without SIGBUS delivery there is one door left.
    stress("sigbus", &["--seconds", "0.5", "--delivery", "thread"]);
}

#[test]
fn a_storm_of_changed_mappings() {
    let _watchdog = Watchdog::new("storm");
    if !usable() {
        return;
    }
    for disabled in [
        "",
        "move",
        "events",
        "move,events,pagemap_scan,procmap_query",
    ] {
        for delivery in ["inline", "thread"] {
            let args = ["--seconds", "2", "--delivery", delivery, "--seed", "5"];
            run(env!("CARGO_BIN_EXE_storm"), disabled, &args);
        }
    }
}
