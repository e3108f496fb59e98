//! What the commands of this directory understand alike.

/// Past this nobody waits; and no clock's end is reached.
const LONGEST: f64 = 10.0 * 365.0 * 24.0 * 3600.0;

/// A page: the least memory that a device can have.
pub(crate) const PAGE: usize = 4096;

pub(crate) fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if seconds > 0.0 && seconds <= LONGEST => Ok(seconds),
        _ => Err("expected more than 0, and ten years at most".to_owned()),
    }
}
