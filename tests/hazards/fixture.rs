//! What each test is run with: both doors, here or in a process of its own.

use std::time::Duration;

use svm::{Delivery, Granule, Options};
use tests::{Watchdog, in_own_process, usable};

pub(crate) fn both_doors(name: &'static str, test: impl Fn(&Options)) {
    let _watchdog = Watchdog::with_timeout(name, Duration::from_secs(30));
    if usable() {
        for delivery in [Delivery::Inline, Delivery::Thread] {
            test(&Options::new().delivery(delivery).granule(Granule::Page));
        }
    }
}

/// The same in a process of its own: a fork brings home what tests beside it count.
pub(crate) fn both_doors_alone(test: &str, name: &'static str, body: impl Fn(&Options)) {
    in_own_process(test, &[""], || both_doors(name, body));
}
