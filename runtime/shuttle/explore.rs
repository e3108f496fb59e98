//! Running schedules: which thread goes on at each point, by a seed; what is counted; and how a schedule that fails is shown.
//!
//! Two ways of choosing take turns. *Random*: any thread that can run, each point anew. *PCT* (probabilistic concurrency testing): threads
//! have random priorities, the highest one runs, and at a few random steps the one that runs gets the lowest; a bug that needs *d* ordered
//! switches among *k* steps of *n* threads is found with a probability of at least 1 / (n k^(d-1)) in each schedule.
//!
//! Both begin anew from a seed with every schedule, so the seed, and for PCT its two parameters, are the schedule.

use crate::kernel::{self, Outcome};
use crate::scenarios::{MUTATIONS, Mutated, SCENARIOS, Scenario};
use crate::sync::mutation;
use shuttle::scheduler::{Schedule, Scheduler, Task, TaskId};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The wall clock: budgets are of real time.
type Wall = real::Instant;
mod real {
    /// Nanoseconds of the real monotonic clock: `std`'s is the models'.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Instant(libc::timespec);

    impl Instant {
        pub(super) fn now() -> Self {
            let mut now = libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            // SAFETY: `now` is valid for writes.
            unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
            Self(now)
        }

        pub(super) fn elapsed(self) -> std::time::Duration {
            let now = Self::now().0;
            let ns = (now.tv_sec - self.0.tv_sec) * 1_000_000_000 + now.tv_nsec - self.0.tv_nsec;
            std::time::Duration::from_nanos(ns.try_into().unwrap_or(0))
        }
    }
}

/// A generator that is the same everywhere and for ever (splitmix64).
#[derive(Clone, Debug)]
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % (n.max(1) as u64)).unwrap_or(0)
    }
}

/// How threads are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Random,
    Pct { depth: usize, length: usize },
}

/// One schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ticket {
    way: Way,
    seed: u64,
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.way {
            Way::Random => write!(f, "random:{}", self.seed),
            Way::Pct { depth, length } => write!(f, "pct:{depth}:{length}:{}", self.seed),
        }
    }
}

impl Ticket {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let way = match parts.next()? {
            "random" => Way::Random,
            "pct" => Way::Pct {
                depth: parts.next()?.parse().ok()?,
                length: parts.next()?.parse().ok()?,
            },
            _ => return None,
        };
        let seed = parts.next()?.parse().ok()?;
        Some(Self { way, seed })
    }
}

/// What is running, for the report of a failure.
#[derive(Clone, Debug, Default)]
struct Running {
    scenario: &'static str,
    mutated: Option<mutation::Mutation>,
    ticket: Option<Ticket>,
    nr_schedules: usize,
}

static RUNNING: Mutex<Running> = Mutex::new(Running {
    scenario: "",
    mutated: None,
    ticket: None,
    nr_schedules: 0,
});
static LONGEST: AtomicUsize = AtomicUsize::new(0);
/// How many steps random schedules have, on the average: what PCT's switches are spread over.
static USUAL: AtomicUsize = AtomicUsize::new(0);

fn running() -> std::sync::MutexGuard<'static, Running> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which schedules to run.
#[derive(Clone, Debug)]
enum Budget {
    /// One.
    Ticket(Ticket),
    /// From this seed on, until one fails or the time is over; at least one.
    Time(u64, Duration),
}

#[derive(Debug)]
struct Chooser {
    budget: Budget,
    begun: Wall,
    nr_begun: u64,
    dice: Dice,
    way: Way,
    step: usize,
    priorities: BTreeMap<usize, u64>,
    switches: BTreeSet<usize>,
    lowest: u64,
}

impl Chooser {
    fn new(budget: Budget) -> Self {
        Self {
            budget,
            begun: Wall::now(),
            nr_begun: 0,
            dice: Dice(0),
            way: Way::Random,
            step: 0,
            priorities: BTreeMap::new(),
            switches: BTreeSet::new(),
            lowest: 0,
        }
    }

    fn next_ticket(&self) -> Option<Ticket> {
        match self.budget {
            Budget::Ticket(ticket) => (self.nr_begun == 0).then_some(ticket),
            Budget::Time(_, limit) if self.nr_begun > 0 && self.begun.elapsed() > limit => None,
            Budget::Time(first, _) => {
                let seed = first + self.nr_begun;
                let length = USUAL.load(Relaxed);
                let way = if self.nr_begun.is_multiple_of(2) || length == 0 {
                    Way::Random
                } else {
                    let depth = 2 + usize::try_from(self.nr_begun / 2 % 4).unwrap_or(0);
                    Way::Pct { depth, length }
                };
                Some(Ticket { way, seed })
            }
        }
    }
}

impl Scheduler for Chooser {
    fn new_execution(&mut self) -> Option<Schedule> {
        let ticket = self.next_ticket()?;
        LONGEST.fetch_max(self.step, Relaxed);
        if self.way == Way::Random && self.step > 0 {
            let usual = USUAL.load(Relaxed);
            USUAL.store(
                if usual == 0 {
                    self.step
                } else {
                    (usual * 7 + self.step) / 8
                },
                Relaxed,
            );
        }
        self.nr_begun += 1;
        self.dice = Dice(ticket.seed);
        // Seeds are neighbours; what they are expanded to is not.
        self.dice.0 = self.dice.next();
        self.way = ticket.way;
        self.step = 0;
        self.priorities.clear();
        self.switches.clear();
        self.lowest = u64::MAX / 2;
        if let Way::Pct { depth, length } = ticket.way {
            for _ in 1..depth {
                let at = self.dice.below(length);
                self.switches.insert(at);
            }
        }
        let mut running = running();
        running.ticket = Some(ticket);
        running.nr_schedules += 1;
        Some(Schedule::new(ticket.seed))
    }

    fn next_task(
        &mut self,
        runnable: &[&Task],
        current: Option<TaskId>,
        is_yielding: bool,
    ) -> Option<TaskId> {
        if let [only] = runnable {
            return Some(only.id());
        }
        self.step += 1;
        if self.way == Way::Random {
            return Some(runnable[self.dice.below(runnable.len())].id());
        }
        for task in runnable {
            let id = usize::from(task.id());
            if !self.priorities.contains_key(&id) {
                let priority = u64::MAX / 2 + self.dice.next() / 2;
                self.priorities.insert(id, priority);
            }
        }
        if let Some(current) = current
            && (is_yielding || self.switches.contains(&self.step))
        {
            self.lowest -= 1;
            self.priorities.insert(usize::from(current), self.lowest);
        }
        runnable
            .iter()
            .max_by_key(|task| self.priorities.get(&usize::from(task.id())))
            .map(|task| task.id())
    }

    fn next_u64(&mut self) -> u64 {
        self.dice.next()
    }
}

/// Runs `scenario`'s schedules; how many there were. One that fails ends the process.
fn run(scenario: &'static Scenario, budget: Budget) -> usize {
    let mutated = running().mutated;
    *running() = Running {
        scenario: scenario.name,
        mutated,
        ..Running::default()
    };
    LONGEST.store(0, Relaxed);
    USUAL.store(0, Relaxed);
    let mut config = Config::new();
    config.stack_size = 1 << 20;
    config.failure_persistence = FailurePersistence::None;
    config.max_steps = MaxSteps::FailAfter(number("SVM_SHUTTLE_MAX_STEPS").unwrap_or(MAX_STEPS));
    config.silence_warnings = true;
    Runner::new(Chooser::new(budget), config).run(scenario.run)
}

/// A number in the environment.
fn number<N: std::str::FromStr>(variable: &str) -> Option<N> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Points of one schedule: with more of them somebody waits for what does not come.
const MAX_STEPS: usize = 100_000;

/// What a process that found a failing schedule ends with.
const FOUND: u8 = 3;

/// Reports the schedule that has just failed, and ends the process: nothing of it is in a state to go on from.
fn report_failures() {
    std::panic::set_hook(Box::new(|panic| {
        let running = running().clone();
        let payload = panic.payload();
        let why = payload
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| payload.downcast_ref::<&str>().copied())
            .unwrap_or("no reason given");
        let ticket = running.ticket.map(|t| t.to_string()).unwrap_or_default();
        println!(
            "FAILED {} in schedule {}: {why}",
            running.scenario, running.nr_schedules
        );
        if let Some(location) = panic.location() {
            println!("    at {location}");
        }
        let mutation = running
            .mutated
            .map(|m| format!(" {m:?}"))
            .unwrap_or_default();
        println!(
            "    again: ci/models.sh --replay {} {ticket}{mutation}",
            running.scenario
        );
        println!("{}", ladder());
        std::process::exit(i32::from(FOUND));
    }));
}

/// The last steps of the schedule, a column per thread.
fn ladder() -> String {
    let shown = number("SVM_SHUTTLE_STEPS").unwrap_or(60_usize);
    let log = kernel::log();
    let steps = &log.steps;
    let last = &steps[steps.len().saturating_sub(shown)..];
    let lanes: BTreeSet<usize> = last.iter().map(|step| step.thread).collect();
    let lanes: Vec<usize> = lanes.into_iter().collect();
    const WIDTH: usize = 34;
    let mut drawn = String::new();
    for &lane in &lanes {
        let name = log.names.get(&lane).map_or("", String::as_str);
        drawn += &format!("    {name:WIDTH$}");
    }
    for step in last {
        let lane = lanes
            .iter()
            .position(|&lane| lane == step.thread)
            .unwrap_or(0);
        let at = log.name_of(step.at);
        let outcome = match step.outcome {
            Outcome::Done => String::new(),
            Outcome::Stopped(stop) => format!(": {stop:?}"),
            Outcome::Value(value) => format!(" {value}"),
        };
        drawn.truncate(drawn.trim_end().len());
        drawn += &format!(
            "\n    {}{} {at}{outcome}",
            " ".repeat(lane * (WIDTH + 4)),
            step.what
        );
    }
    drawn + "\n"
}

pub(crate) fn main() -> ExitCode {
    report_failures();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["--replay", scenario, ticket] => replay(scenario, ticket, None),
        ["--replay", scenario, ticket, mutated] => replay(scenario, ticket, Some(mutated)),
        ["--hunt", mutated, ms, first] => hunt(mutated, ms, first),
        ["--quick"] => all(true, ""),
        ["--quick", name] => all(true, name),
        [] => all(false, ""),
        [name] => all(false, name),
        _ => usage(),
    }
}

fn usage() -> ExitCode {
    eprintln!(
        "svm-shuttle [--quick] [NAME]                   scenarios and mutations whose name contains NAME\n\
         svm-shuttle --replay SCENARIO SCHEDULE [MUTATION]   one schedule again"
    );
    ExitCode::FAILURE
}

fn scenario(name: &str) -> Option<&'static Scenario> {
    SCENARIOS.iter().find(|s| s.name == name)
}

fn mutated(name: &str) -> Option<&'static Mutated> {
    MUTATIONS
        .iter()
        .find(|m| format!("{:?}", m.mutation) == name)
}

fn replay(name: &str, ticket: &str, broken: Option<&str>) -> ExitCode {
    let (Some(scenario), Some(ticket)) = (scenario(name), Ticket::parse(ticket)) else {
        return usage();
    };
    if let Some(broken) = broken {
        let Some(mutated) = mutated(broken) else {
            return usage();
        };
        mutation::mutate(mutated.mutation);
        running().mutated = Some(mutated.mutation);
    }
    run(scenario, Budget::Ticket(ticket));
    println!("{name}: {ticket} holds\n{}", ladder());
    ExitCode::SUCCESS
}

/// Looks for a schedule in which a mutation fails; a process of its own, for it ends with the failure.
fn hunt(name: &str, ms: &str, first: &str) -> ExitCode {
    let (Some(mutated), Ok(ms), Ok(first)) = (mutated(name), ms.parse(), first.parse()) else {
        return usage();
    };
    let Some(scenario) = scenario(mutated.scenario) else {
        return usage();
    };
    mutation::mutate(mutated.mutation);
    running().mutated = Some(mutated.mutation);
    let nr_schedules = run(scenario, Budget::Time(first, Duration::from_millis(ms)));
    println!("{nr_schedules} schedules, and none fails");
    ExitCode::SUCCESS
}

/// Every scenario, which must hold, and every mutation, which must be found.
fn all(is_quick: bool, name: &str) -> ExitCode {
    let ms = |variable, usual| number(variable).unwrap_or(usual);
    let holds_ms = ms("SVM_SHUTTLE_MS", if is_quick { 1_000 } else { 8_000 });
    let hunt_ms = ms(
        "SVM_SHUTTLE_HUNT_MS",
        if is_quick { 10_000 } else { 60_000 },
    );
    // The short run is the same each time; the long one goes where none has been, and says where.
    let seed = number("SVM_SHUTTLE_SEED");
    let first = seed.unwrap_or_else(|| if is_quick { 1 } else { fresh_seed() });
    println!("whole fault paths, seeds from {first} (SVM_SHUTTLE_SEED):");
    for scenario in SCENARIOS.iter().filter(|s| s.name.contains(name)) {
        let begun = Wall::now();
        let nr = run(
            scenario,
            Budget::Time(first, Duration::from_millis(holds_ms)),
        );
        println!(
            "{:24} {nr:6} schedules hold, {} points each, {} at most, {:.1?}",
            scenario.name,
            USUAL.load(Relaxed),
            LONGEST.load(Relaxed),
            begun.elapsed()
        );
    }
    let mut all_found = true;
    let ours: Vec<&Mutated> = MUTATIONS
        .iter()
        .filter(|m| format!("{:?}", m.mutation).contains(name) || m.scenario.contains(name))
        .collect();
    for mutated in ours {
        all_found &= is_found(mutated, hunt_ms, first, !name.is_empty());
    }
    if name.is_empty() {
        for mutation in mutation::Mutation::PATHS {
            if !MUTATIONS.iter().any(|m| m.mutation == *mutation) {
                println!("{mutation:?}: nobody looks for it");
                all_found = false;
            }
        }
    }
    if all_found {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn is_found(mutated: &Mutated, hunt_ms: u64, first: u64, show: bool) -> bool {
    let name = format!("{:?}", mutated.mutation);
    let begun = Wall::now();
    let args = ["--hunt", &name, &hunt_ms.to_string(), &first.to_string()];
    let child = std::env::current_exe().and_then(|me| Command::new(me).args(args).output());
    let Ok(child) = child else {
        println!("{name:24} could not be run");
        return false;
    };
    let said = String::from_utf8_lossy(&child.stdout);
    let found = child.status.code() == Some(i32::from(FOUND));
    let verdict = said.lines().next().unwrap_or_default();
    let is_right = found
        && mutated
            .reasons
            .iter()
            .any(|reason| verdict.contains(reason));
    let word = match (found, is_right) {
        (true, true) => "caught",
        (true, false) => "NOT CAUGHT FOR ITS REASON",
        (false, _) => "NOT CAUGHT",
    };
    println!("{name:24} {word} ({:.1?}): {verdict}", begun.elapsed());
    if show || !is_right {
        println!("{said}{}", String::from_utf8_lossy(&child.stderr));
    }
    is_right
}

fn fresh_seed() -> u64 {
    let mut seed = [0; 4];
    // SAFETY: `seed` is valid for writes of its length.
    unsafe { libc::getrandom(seed.as_mut_ptr().cast(), seed.len(), 0) };
    u64::from(u32::from_ne_bytes(seed))
}
