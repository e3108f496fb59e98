//! A device is there while it is attached.

use svm::{Attachment, Device};
use tests::Dummy;

fn detach(attachment: Attachment<Dummy>) {
    let guard = attachment.device().lock().lock();
    drop(attachment);
    drop(guard);
}

fn main() {}
