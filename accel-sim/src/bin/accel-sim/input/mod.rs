//! What the workloads run on: graphs from files or generated, and plain arrays ([`arrays`]).
//!
//! Each graph format has one file and ends in the same thing, an [`Edges`]: a number of nodes, a
//! list of directed edges and what to call a node. Nothing here knows about ranks, mirrors or
//! devices.
//!
//! | format | file names | module |
//! |---|---|---|
//! | Cargo lock file | `Cargo.lock`, `*.lock` | [`lockfile`] |
//! | Matrix Market, coordinate | `*.mtx` | [`matrix_market`] |
//! | edge list | `*.el`, `*.edges`, `*.edgelist`, `*.txt`, `*.tsv`, `*.csv` | [`edge_list`] |
//! | R-MAT generator | (no file) | [`rmat`] |
//!
//! Input is hostile until proven otherwise: every complaint names the file and, where there is one,
//! the line; a count found in a file is a claim, and what would not fit into memory is refused
//! before it is tried.

pub(crate) mod arrays;
pub(crate) mod edge_list;
pub(crate) mod lockfile;
pub(crate) mod matrix_market;
pub(crate) mod rmat;

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A node's number: dense, from 0.
pub(crate) type Node = u32;

/// A directed graph as a list of edges, in the order of the input. Parallel edges and self-loops
/// are kept.
#[derive(Debug)]
pub(crate) struct Edges {
    /// Nodes are `0..nr_nodes`; one without any edge counts too.
    pub(crate) nr_nodes: usize,
    /// `(from, to)`, both below `nr_nodes`.
    pub(crate) list: Vec<(Node, Node)>,
    /// What the input calls its nodes.
    pub(crate) labels: Labels,
}

/// What an input calls its nodes.
#[derive(Debug)]
pub(crate) enum Labels {
    /// By position, counted from the number given here (Matrix Market counts from 1).
    Position(u64),
    /// By the identifier it had in the file.
    Id(Vec<u64>),
    /// As a package: name and version.
    Package(Vec<String>),
}

impl Labels {
    /// The name of one node, as the input writes it.
    pub(crate) fn of(&self, node: Node) -> String {
        match self {
            Labels::Position(first) => (first + u64::from(node)).to_string(),
            Labels::Id(ids) => ids[node as usize].to_string(),
            Labels::Package(names) => names[node as usize].clone(),
        }
    }

    /// What the nodes and the edges of such a graph are, in the plural.
    pub(crate) fn nouns(&self) -> (&'static str, &'static str) {
        match self {
            Labels::Package(_) => ("packages", "dependencies"),
            Labels::Position(_) | Labels::Id(_) => ("nodes", "edges"),
        }
    }
}

/// Why an input can't be used. All of these end the program with exit status 2.
#[derive(Debug)]
pub(crate) enum Error {
    /// The system would not let us read it.
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Neither its name nor its first line says what it is.
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// It breaks the rules of its format.
    Malformed {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: u64,
        /// What is wrong there.
        what: String,
    },
    /// The command line asks for a result that nobody could tell from a wrong one.
    Vacuous {
        /// Why.
        why: String,
    },
    /// It asks for more than this machine has.
    TooLarge {
        /// What does.
        what: String,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Unreadable { path, source } => write!(f, "{}: {source}", path.display()),
            Error::UnknownFormat { path } => write!(
                f,
                "{}: unknown format; known are Cargo.lock (*.lock), Matrix Market (*.mtx) and edge lists \
                 (*.el, *.edges, *.edgelist, *.txt, *.tsv, *.csv). --format says which one it is",
                path.display()
            ),
            Error::Malformed { path, line, what } => write!(f, "{}:{line}: {what}", path.display()),
            Error::Vacuous { why } => f.write_str(why),
            Error::TooLarge { what } => {
                write!(f, "{what}: too large for the memory of this machine")
            }
        }
    }
}

// `Display` says all of it, the cause included, so there is no `source` to print a second time.
impl std::error::Error for Error {}

/// The format of an input file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// A Cargo.lock: packages and what they depend on
    Lockfile,
    /// Matrix Market, coordinate format: an entry (i, j) is an edge from i to j
    MatrixMarket,
    /// One edge a line: two node ids
    EdgeList,
}

impl Format {
    /// What the file's name says it is.
    fn of_name(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?.to_ascii_lowercase();
        match extension.as_str() {
            "lock" => Some(Format::Lockfile),
            "mtx" => Some(Format::MatrixMarket),
            "el" | "edges" | "edgelist" | "txt" | "tsv" | "csv" => Some(Format::EdgeList),
            _ => None,
        }
    }
}

/// Reads a graph from a file. Without `format`, the file's name tells it, and failing that a Matrix
/// Market banner.
pub(crate) fn read(path: &Path, format: Option<Format>) -> Result<Edges, Error> {
    let unreadable = |source| Error::Unreadable {
        path: path.to_path_buf(),
        source,
    };
    let mut reader = BufReader::with_capacity(1 << 16, File::open(path).map_err(unreadable)?);
    let format = match format.or_else(|| Format::of_name(path)) {
        Some(format) => format,
        None if reader
            .fill_buf()
            .map_err(unreadable)?
            .starts_with(matrix_market::BANNER.as_bytes()) =>
        {
            Format::MatrixMarket
        }
        None => {
            return Err(Error::UnknownFormat {
                path: path.to_path_buf(),
            });
        }
    };
    match format {
        Format::Lockfile => {
            let mut bytes = Vec::new();
            let mut limited = reader.take(lockfile::LARGEST + 1);
            limited.read_to_end(&mut bytes).map_err(unreadable)?;
            lockfile::parse(path, text_of(path, &bytes)?)
        }
        Format::MatrixMarket => matrix_market::parse(Lines::new(path, reader)),
        Format::EdgeList => edge_list::parse(Lines::new(path, reader)),
    }
}

/// The bytes as text, or the line on which they are none.
fn text_of<'a>(path: &Path, bytes: &'a [u8]) -> Result<&'a str, Error> {
    std::str::from_utf8(bytes).map_err(|error| {
        let before = &bytes[..error.valid_up_to()];
        let nr_newlines = before.iter().filter(|&&byte| byte == b'\n').count();
        Error::Malformed {
            path: path.to_path_buf(),
            line: nr_newlines as u64 + 1,
            what: "not UTF-8".to_owned(),
        }
    })
}

/// Whether the system would grant this much memory at all. It is asked, and the answer given back:
/// enough to turn away what is absurd with a message, where going on would end in an abort.
pub(crate) fn fits_memory(bytes: u64) -> bool {
    let Ok(bytes) = usize::try_from(bytes) else {
        return false;
    };
    let mut room: Vec<u8> = Vec::new();
    let granted = room.try_reserve_exact(bytes).is_ok();
    // An allocation nobody looks at is one the compiler may leave out.
    std::hint::black_box(&room);
    granted
}

/// Whether a graph of this size can be ranked here: as input, as the device sees it, and by the
/// oracle.
pub(crate) fn graph_fits_memory(nr_nodes: u64, nr_edges: u64) -> bool {
    /// Ranks old and new on both sides, degrees, offsets.
    const PER_NODE: u64 = 80;
    /// The edge list, the CSR, linked edges.
    const PER_EDGE: u64 = 32;
    let nodes = nr_nodes.checked_mul(PER_NODE);
    let edges = nr_edges.checked_mul(PER_EDGE);
    let bytes = nodes
        .zip(edges)
        .and_then(|(nodes, edges)| nodes.checked_add(edges));
    bytes.is_some_and(fits_memory)
}

/// The lines of a text file, one at a time in one reused buffer, each with its number.
pub(crate) struct Lines<'p, R> {
    path: &'p Path,
    reader: R,
    buffer: Vec<u8>,
    number: u64,
}

impl<'p, R: BufRead> Lines<'p, R> {
    pub(crate) fn new(path: &'p Path, reader: R) -> Self {
        Lines {
            path,
            reader,
            buffer: Vec::new(),
            number: 0,
        }
    }

    /// Steps to the next line; false at the end of the file. The number then stays that of the last
    /// line.
    pub(crate) fn advance(&mut self) -> Result<bool, Error> {
        /// No format here has longer lines; a file that is no text at all may.
        const LONGEST: u64 = 64 << 10;
        self.buffer.clear();
        let mut bounded = self.reader.by_ref().take(LONGEST);
        let read = bounded.read_until(b'\n', &mut self.buffer);
        let read = read.map_err(|source| Error::Unreadable {
            path: self.path.to_path_buf(),
            source,
        })?;
        self.number += u64::from(read > 0);
        if read as u64 == LONGEST && !self.buffer.ends_with(b"\n") {
            return Err(self.malformed(format!("a line longer than {LONGEST} bytes")));
        }
        Ok(read > 0)
    }

    /// The line stepped to, without the white space around it.
    pub(crate) fn text(&self) -> Result<&str, Error> {
        match str::from_utf8(&self.buffer) {
            Ok(line) => Ok(line.trim()),
            Err(_) => Err(self.malformed("not UTF-8 text")),
        }
    }

    /// A complaint about the line stepped to.
    pub(crate) fn malformed(&self, what: impl Into<String>) -> Error {
        Error::Malformed {
            path: self.path.to_path_buf(),
            // An empty file is complained about at its first line.
            line: self.number.max(1),
            what: what.into(),
        }
    }

    /// Reads one field of the line stepped to as a `T`; `what` names the field in the complaint.
    pub(crate) fn number<T: FromStr>(&self, field: Option<&str>, what: &str) -> Result<T, Error> {
        let Some(field) = field else {
            return Err(self.malformed(format!("expected {what}, found the end of the line")));
        };
        field
            .parse()
            .map_err(|_| self.malformed(format!("expected {what}, found '{}'", excerpt(field))))
    }
}

/// As much of a field as is fit for a message: no control characters, no megabytes.
pub(crate) fn excerpt(field: &str) -> String {
    const LONGEST: usize = 40;
    let mut chars = field.chars().flat_map(char::escape_debug);
    let mut short: String = chars.by_ref().take(LONGEST).collect();
    if chars.next().is_some() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;

    #[test]
    fn the_name_tells_the_format() {
        for (name, format) in [
            ("Cargo.lock", Some(Format::Lockfile)),
            ("a/b.MTX", Some(Format::MatrixMarket)),
            ("web.el", Some(Format::EdgeList)),
            ("web.tsv", Some(Format::EdgeList)),
            ("web.mtx.gz", None),
            ("web", None),
        ] {
            assert_eq!(Format::of_name(Path::new(name)), format, "{name}");
        }
    }

    #[test]
    fn lines_are_counted_and_trimmed() {
        let mut lines = Lines::new(Path::new("f"), &b" a \r\n\nb"[..]);
        for (number, text) in [(1, "a"), (2, ""), (3, "b")] {
            assert!(lines.advance().unwrap());
            assert_eq!((lines.number, lines.text().unwrap()), (number, text));
        }
        assert!(!lines.advance().unwrap());
        assert_eq!(lines.malformed("over").to_string(), "f:3: over");
    }

    #[test]
    fn bytes_that_are_no_text_are_refused_by_line() {
        let mut lines = Lines::new(Path::new("f"), &b"a\n\xff\xfe\n"[..]);
        assert!(lines.advance().unwrap() && lines.text().is_ok());
        assert!(lines.advance().unwrap());
        assert_eq!(lines.text().unwrap_err().to_string(), "f:2: not UTF-8 text");
    }

    #[test]
    fn a_line_has_an_end() {
        let zeros = BufReader::new(io::repeat(0));
        let error = Lines::new(Path::new("zero"), zeros).advance().unwrap_err();
        assert_eq!(error.to_string(), "zero:1: a line longer than 65536 bytes");
        let longest = [vec![b'x'; 65535], b"\n".to_vec()].concat();
        assert!(Lines::new(Path::new("f"), &longest[..]).advance().unwrap());
    }

    #[test]
    fn what_is_absurd_does_not_fit() {
        assert!(fits_memory(0) && graph_fits_memory(1 << 10, 1 << 14));
        assert!(!fits_memory(1 << 60) && !fits_memory(u64::MAX));
        assert!(!graph_fits_memory(1 << 60, 0) && !graph_fits_memory(0, u64::MAX));
    }

    /// Whatever is done to a good file, parsing ends, with edges that are in bounds or a complaint
    /// that names the file.
    #[test]
    fn mutilated_files_are_parsed_or_refused() {
        /// Bytes that mean something to one of the formats.
        const TELLING: &[u8] = b"0919 \n,\"[]=-%#";
        type Parse = fn(&Path, &[u8]) -> Result<Edges, Error>;
        let lockfile: Parse = |path, bytes| match str::from_utf8(bytes) {
            Ok(text) => lockfile::parse(path, text),
            Err(_) => Err(Lines::new(path, bytes).malformed("not UTF-8 text")),
        };
        let matrix_market: Parse = |path, bytes| matrix_market::parse(Lines::new(path, bytes));
        let edge_list: Parse = |path, bytes| edge_list::parse(Lines::new(path, bytes));
        let package = |name: &str, dependencies: &str| {
            format!(
                "[[package]]\nname = \"{name}\"\nversion = \"1.0.0\"\ndependencies = [{dependencies}]\n"
            )
        };
        let lock = package("a", "\"b\", \"c 1.0.0\"") + &package("b", "\"c\"") + &package("c", "");
        let matrix =
            "%%MatrixMarket matrix coordinate real symmetric\n3 3 3\n1 1 1e0\n2 1 -2.5\n3 2 3\n";
        let list = "# edges\n1 2\n2,3 0.5\n18446744073709551615 1\n";

        let mut rng = Pcg64Mcg::seed_from_u64(1);
        let (mut parsed, mut refused) = (0, 0);
        for (good, parse) in [
            (lock.as_str(), lockfile),
            (matrix, matrix_market),
            (list, edge_list),
        ] {
            for round in 0..3000 {
                let mut bytes = good.as_bytes().to_vec();
                for _ in 0..rng.random_range(0..4) {
                    let at = rng.random_range(0..bytes.len());
                    match rng.random_range(0..4) {
                        0 => bytes[at] = rng.random(),
                        1 => bytes[at] = TELLING[rng.random_range(0..TELLING.len())],
                        2 => bytes.truncate(at.max(1)),
                        _ => bytes.insert(at, bytes[rng.random_range(0..bytes.len())]),
                    }
                }
                match parse(Path::new("file"), &bytes) {
                    Ok(edges) => {
                        parsed += 1;
                        let in_bounds = |node: Node| (node as usize) < edges.nr_nodes;
                        let all = edges
                            .list
                            .iter()
                            .all(|&(from, to)| in_bounds(from) && in_bounds(to));
                        assert!(all, "round {round}: {bytes:?}");
                        edges.labels.of(edges.nr_nodes as Node - 1);
                    }
                    Err(error) => {
                        refused += 1;
                        assert!(
                            error.to_string().starts_with("file:"),
                            "round {round}: {error}"
                        );
                    }
                }
            }
        }
        // Both happen, so both were tested.
        assert!(
            parsed > 1000 && refused > 1000,
            "{parsed} parsed, {refused} refused"
        );
    }

    #[test]
    fn an_excerpt_is_short_and_printable() {
        assert_eq!(excerpt("a\u{1b}[31m"), "a\\u{1b}[31m");
        assert_eq!(excerpt(&"x".repeat(1000)).chars().count(), 41);
    }
}
