//! The machine: what a result has to name to mean anything, and what a bench does to be undisturbed on it.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use serde::Serialize;

/// Where and when a run was made.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Model name of the first CPU.
    pub cpu: String,
    /// CPUs that this process may use.
    pub nr_cpus: usize,
    /// Release of the kernel.
    pub kernel: String,
    /// Whether the kernel runs under a hypervisor.
    pub is_virtual: bool,
    /// Seconds since 1970 at the start of the run.
    pub unix_time: u64,
    /// Load averages (1, 5, 15 minutes) at the start: what else went on.
    pub load: String,
    /// What the runtime found here.
    pub capabilities: String,
}

impl Machine {
    /// Looks around.
    #[must_use]
    pub fn here() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split(':').nth(1))
                .map_or_else(String::new, |value| value.trim().to_owned())
        };
        let read = |path: &str| {
            std::fs::read_to_string(path)
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        Self {
            cpu: field("model name"),
            nr_cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: read("/proc/sys/kernel/osrelease"),
            is_virtual: field("flags").split(' ').any(|flag| flag == "hypervisor"),
            unix_time: std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |d| d.as_secs()),
            load: read("/proc/loadavg"),
            capabilities: format!("{:?}", svm::Capabilities::probe()),
        }
    }
}

impl Machine {
    /// The day of the run, as in 2026-01-31 (UTC).
    #[must_use]
    pub fn date(&self) -> String {
        // Howard Hinnant's `civil_from_days`: years begin in March, so that the leap day is the last.
        let days = self.unix_time / 86_400 + 719_468;
        let (era, day) = (days / 146_097, days % 146_097);
        let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let of_year = day - (365 * year + year / 4 - year / 100);
        let month = (5 * of_year + 2) / 153;
        let (d, m) = (
            of_year - (153 * month + 2) / 5 + 1,
            if month < 10 { month + 3 } else { month - 9 },
        );
        format!("{:04}-{m:02}-{d:02}", year + era * 400 + u64::from(m <= 2))
    }
}

/// Confines the calling thread, and threads it will start, to one CPU. Without effect where there is no such CPU.
pub fn pin_to_cpu(cpu: usize) {
    set_affinity(|set| {
        // SAFETY: `set` is an initialised set, and CPU_SET ignores numbers beyond it.
        unsafe { libc::CPU_SET(cpu, set) }
    });
}

/// Lets the calling thread run on every CPU.
pub fn unpin() {
    set_affinity(|set| {
        for cpu in 0..std::thread::available_parallelism()
            .map_or(1, usize::from)
            .max(64)
        {
            // SAFETY: as in `pin_to_cpu`.
            unsafe { libc::CPU_SET(cpu, set) }
        }
    });
}

fn set_affinity(fill: impl FnOnce(&mut libc::cpu_set_t)) {
    // SAFETY: a cpu_set_t is an array of integers: zero is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    fill(&mut set);
    // SAFETY: `set` is initialised, and as large as the call is told.
    unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
}

/// What else runs while a case is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Setting {
    /// No other thread of this process.
    Quiet,
    /// One thread computes on the other CPU, as a device's worker does: flushes of the translation cache interrupt it.
    Busy,
}

impl Setting {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Quiet => "quiet",
            Self::Busy => "busy",
        }
    }
}

/// A thread that computes on one CPU until it is dropped.
#[derive(Debug)]
pub struct Company {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Company {
    /// Starts it where `setting` asks for it.
    #[must_use]
    pub fn for_setting(setting: Setting, cpu: usize) -> Option<Self> {
        (setting == Setting::Busy).then(|| {
            let stop = Arc::new(AtomicBool::new(false));
            let seen = stop.clone();
            let thread = std::thread::spawn(move || {
                pin_to_cpu(cpu);
                let mut x = 1_u64;
                // Relaxed: it orders nothing.
                while !seen.load(Ordering::Relaxed) {
                    x = black_box(x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
                }
                x
            });
            Self {
                stop,
                thread: Some(thread),
            }
        })
    }
}

impl Drop for Company {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
