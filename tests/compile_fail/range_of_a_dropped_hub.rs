//! A range can't be used once its hub has gone.

use svm::notifier::{Hub, Interval};
use svm::sync::Deadline;

fn main() {
    let hub = Hub::new();
    let range = hub.insert(Interval::new(0, 1));
    drop(hub);
    let _ = range.begin(Deadline::PASSED);
}
