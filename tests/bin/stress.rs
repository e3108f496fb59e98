//! The stress as a command: `stress --seconds 60 --delivery thread --granule 2m`. Exit status 0 if nothing was lost.

use std::process::ExitCode;
use std::time::Duration;

use svm::{Delivery, Granule};
use tests::Watchdog;
use tests::stress::{self, Config};

const USAGE: &str = "stress [--seconds N] [--seed S] [--delivery inline|thread] [--granule 4k|64k|2m] [--workers N] \
                     [--device-memory BYTES|none] [--accelerators N] [--sessions N] [--shared-pages N] \
                     [--only counters|pages|sessions|list|events]...";

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
                config.time = Duration::from_secs_f64(
                    value.parse().map_err(|e| format!("{name} {value}: {e}"))?,
                );
            }
            "--seed" => config.seed = number()? as u64,
            "--workers" => config.workers = number()?,
            "--accelerators" => config.accelerators = number()?,
            "--sessions" => config.sessions = number()?,
            "--shared-pages" => config.shared_pages = number()?,
            "--only" => config.only.push(value),
            "--device-memory" => {
                config.device_memory = if value == "none" {
                    None
                } else {
                    Some(number()?)
                }
            }
            "--delivery" => {
                config.delivery = match value.as_str() {
                    "inline" => Delivery::Inline,
                    "thread" => Delivery::Thread,
                    _ => return Err(format!("{name} {value}: inline or thread")),
                }
            }
            "--granule" => {
                config.granule = match value.as_str() {
                    "4k" => Granule::Page,
                    "64k" => Granule::Big,
                    "2m" => Granule::Huge,
                    _ => return Err(format!("{name} {value}: 4k, 64k or 2m")),
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
            eprintln!("stress: {what}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    // Not half as long again, but a while: a hang must be told from a machine that is busy.
    let _watchdog = Watchdog::with_timeout("stress", config.time + Duration::from_secs(50));
    println!("{config:?}");
    match stress::run(&config) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(what) => {
            println!("FAILED: {what}");
            ExitCode::FAILURE
        }
    }
}
