//! Which CPUs a thread may run on, and which one it ran on.

use std::io::Write as _;

/// A set of CPUs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cpus(libc::cpu_set_t);

impl Cpus {
    fn none() -> Self {
        // SAFETY: a cpu_set_t is an array of integers: zero is the empty set.
        Self(unsafe { std::mem::zeroed() })
    }

    /// All that the kernel may have.
    pub(crate) fn all() -> Self {
        let mut cpus = Self::none();
        for cpu in 0..8 * size_of_val(&cpus.0) {
            // SAFETY: the set is initialised, and has so many bits.
            unsafe { libc::CPU_SET(cpu, &mut cpus.0) };
        }
        cpus
    }

    /// This one; `None` beyond what a set can name. Fault path.
    pub(crate) fn one(cpu: usize) -> Option<Self> {
        let mut cpus = Self::none();
        if cpu >= 8 * size_of_val(&cpus.0) {
            return None;
        }
        // SAFETY: the set is initialised, and has more bits than that.
        unsafe { libc::CPU_SET(cpu, &mut cpus.0) };
        Some(cpus)
    }

    /// Those that the calling thread may run on; `None` where the kernel has more CPUs than a set can name. Fault path.
    pub(crate) fn of_this_thread() -> Option<Self> {
        let mut cpus = Self::none();
        // SAFETY: writes at most as many bytes as it is told, which is the set.
        let got = unsafe { libc::sched_getaffinity(0, size_of_val(&cpus.0), &raw mut cpus.0) };
        (got == 0).then_some(cpus)
    }

    /// Whether there is a choice. Fault path.
    pub(crate) fn has_several(&self) -> bool {
        // SAFETY: the set is initialised.
        unsafe { libc::CPU_COUNT(&self.0) > 1 }
    }

    /// The calling thread runs on these alone; false where it may not. Fault path.
    pub(crate) fn confine_this_thread(&self) -> bool {
        // SAFETY: reads the set.
        unsafe { libc::sched_setaffinity(0, size_of_val(&self.0), &raw const self.0) == 0 }
    }
}

/// The CPU that thread `tid` of this process runs on, or ran on last. Some microseconds. Fault path.
pub(crate) fn cpu_of_thread(tid: usize) -> Option<usize> {
    let mut path = [0_u8; 48];
    // All but the last byte, which ends the string.
    let mut rest = &mut path[..47];
    write!(rest, "/proc/self/task/{tid}/stat").ok()?;
    // SAFETY: a string that ends with a zero.
    let fd = unsafe { libc::open(path.as_ptr().cast(), libc::O_RDONLY | libc::O_CLOEXEC) };
    if fd < 0 {
        return None;
    }
    let mut text = [0_u8; 512];
    // SAFETY: writes at most as many bytes as it is told.
    let len = unsafe { libc::read(fd, text.as_mut_ptr().cast(), text.len()) };
    // SAFETY: opened here, and nobody else knows it.
    unsafe { libc::close(fd) };
    field(text.get(..usize::try_from(len).ok()?)?, 39)
}

/// Field `nr` of proc_pid_stat(5), from the fourth on. The second is a name in parentheses, which may contain anything.
fn field(stat: &[u8], nr: usize) -> Option<usize> {
    let behind_name = stat.iter().rposition(|&byte| byte == b')')? + 2;
    let word = stat
        .get(behind_name..)?
        .split(|&byte| byte == b' ')
        .nth(nr - 3)?;
    std::str::from_utf8(word).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::process::gettid;

    #[test]
    fn a_thread_is_where_it_is_confined_to() {
        std::thread::spawn(|| {
            let home = Cpus::of_this_thread().expect("few CPUs");
            let tid = gettid() as usize;
            for cpu in 0..8 {
                // SAFETY: the set is initialised.
                if unsafe { libc::CPU_ISSET(cpu, &home.0) } {
                    let only = Cpus::one(cpu).expect("a small number");
                    assert!(only.confine_this_thread() && !only.has_several());
                    assert_eq!(cpu_of_thread(tid), Some(cpu));
                }
            }
            assert!(Cpus::all().confine_this_thread());
        })
        .join()
        .expect("no panic");
        assert_eq!(cpu_of_thread(usize::MAX), None);
        assert!(Cpus::one(1 << 20).is_none());
    }

    #[test]
    fn a_name_may_look_like_fields() {
        assert_eq!(field(b"7 (a) S 1 (b)) R 4 5", 5), Some(5));
        assert_eq!(field(b"7 (a) S", 39), None);
    }
}
