//! The storm as a command: `storm --seconds 600 --seed 7`. Exit status 0 if nothing was lost, 1 if something was, with the seed.

use std::process::ExitCode;
use std::time::Duration;

use svm::Delivery;
use tests::Watchdog;
use tests::storm::{self, Config};

const USAGE: &str = "storm [--seconds N] [--seed S] [--delivery inline|thread|both] [--arenas N] [--pages N] \
                     [--device-memory BYTES]";

fn parse(mut args: impl Iterator<Item = String>) -> Result<Config, String> {
    let mut config = Config::default();
    while let Some(name) = args.next() {
        let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
        let number = || {
            value
                .parse::<usize>()
                .map_err(|e| format!("{name} {value}: {e}"))
        };
        match name.as_str() {
            "--seconds" => {
                let seconds = value.parse().map_err(|e| format!("{name} {value}: {e}"))?;
                config.time = Duration::from_secs_f64(seconds);
            }
            "--seed" => config.seed = number()? as u64,
            "--arenas" => config.arenas = number()?.max(1),
            "--pages" => config.pages = number()?.max(1),
            "--device-memory" => config.device_memory = number()?,
            "--delivery" => {
                config.delivery = match value.as_str() {
                    "inline" => Some(Delivery::Inline),
                    "thread" => Some(Delivery::Thread),
                    "both" => None,
                    _ => return Err(format!("{name} {value}: inline, thread or both")),
                }
            }
            _ => return Err(format!("{name}: unknown")),
        }
    }
    Ok(config)
}

fn main() -> ExitCode {
    if std::env::args().any(|arg| arg == "--help") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    let config = match parse(std::env::args().skip(1)) {
        Ok(config) => config,
        Err(what) => {
            eprintln!("storm: {what}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    // A hang must be told from a machine that is busy.
    let _watchdog = Watchdog::with_timeout("storm", config.time + Duration::from_secs(50));
    println!("{config:?}");
    match storm::run(&config) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(what) => {
            println!("LOST, seed {}: {what}", config.seed);
            ExitCode::FAILURE
        }
    }
}
