//! Cargo.lock as a graph: a node per package, an edge from each package to each that it depends on.
//!
//! Rank flows along the edges, so a package ranks high when many packages, or a few that rank high
//! themselves, depend on it. The lock file's own rules for naming a dependency are kept: the name
//! alone when it is unique in the file, then name and version, then name, version and source; older
//! versions of the format always write all three.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use toml::Spanned;

use super::{Edges, Error, Labels, Node, excerpt};

/// In bytes. The largest known are a few megabytes; what is larger than this is something else.
pub(crate) const LARGEST: u64 = 256 << 20;

/// The part of a lock file that is the graph.
#[derive(Deserialize)]
struct Lockfile {
    /// The workspace's root in the first version of the format; an ordinary package since.
    root: Option<Spanned<Package>>,
    #[serde(default)]
    package: Vec<Spanned<Package>>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    source: Option<String>,
    #[serde(default)]
    dependencies: Vec<Spanned<String>>,
}

impl Package {
    fn label(&self) -> String {
        format!("{} {}", self.name, self.version)
    }

    /// Whether a dependency written with these parts can mean this package.
    fn answers_to(&self, version: Option<&str>, source: Option<&str>) -> bool {
        // A git source ends in `#commit`, which a dependency may leave out.
        let stem = |source: &str| source.split('#').next().map(str::to_owned);
        version.is_none_or(|version| version == self.version)
            && source.is_none_or(|source| self.source.as_deref().and_then(stem) == stem(source))
    }
}

/// Parses the text of a lock file.
pub(crate) fn parse(path: &Path, text: &str) -> Result<Edges, Error> {
    let malformed = |at: usize, what: String| Error::Malformed {
        path: path.to_path_buf(),
        line: line_of(text, at),
        what,
    };
    if text.len() as u64 > LARGEST {
        return Err(malformed(
            0,
            format!("no lock file is larger than {LARGEST} bytes"),
        ));
    }
    let file: Lockfile = toml::from_str(text).map_err(|error: toml::de::Error| {
        let Range { start, .. } = error.span().unwrap_or(0..0);
        malformed(start, error.message().to_owned())
    })?;
    let packages: Vec<&Spanned<Package>> = file.root.iter().chain(&file.package).collect();
    if packages.is_empty() {
        return Err(malformed(0, "no [[package]] in this file".to_owned()));
    }

    let mut named: HashMap<&str, Vec<Node>> = HashMap::new();
    for (node, package) in packages.iter().enumerate() {
        let Package { name, version, .. } = package.get_ref();
        if !is_word(name) || !is_word(version) {
            let label = excerpt(&package.get_ref().label());
            return Err(malformed(
                package.span().start,
                format!("'{label}' is no package name and version"),
            ));
        }
        let namesakes = named.entry(name).or_default();
        let same = |&other: &Node| {
            let (a, b) = (packages[other as usize].get_ref(), package.get_ref());
            (&a.version, &a.source) == (&b.version, &b.source)
        };
        if namesakes.iter().any(same) {
            let label = excerpt(&package.get_ref().label());
            return Err(malformed(
                package.span().start,
                format!("package '{label}' is there twice"),
            ));
        }
        // A file of 2^32 packages does not fit the memory it would be read into.
        namesakes.push(node as Node);
    }

    let mut list = Vec::new();
    for (node, package) in packages.iter().enumerate() {
        for dependency in &package.get_ref().dependencies {
            let (name, version, source) = parts(dependency.get_ref());
            let namesakes = named.get(name).map_or(&[][..], Vec::as_slice);
            let mut fitting = namesakes.iter().filter(|&&node| {
                packages[node as usize]
                    .get_ref()
                    .answers_to(version, source)
            });
            let complain = |what: &str| {
                let dependency_name = excerpt(dependency.get_ref());
                malformed(
                    dependency.span().start,
                    format!("dependency '{dependency_name}' {what}"),
                )
            };
            match (fitting.next(), fitting.next()) {
                (Some(&to), None) => list.push((node as Node, to)),
                (None, _) => return Err(complain("names no package of this file")),
                (Some(_), Some(_)) => {
                    return Err(complain("names more than one package of this file"));
                }
            }
        }
    }
    Ok(Edges {
        nr_nodes: packages.len(),
        list,
        labels: Labels::Package(
            packages
                .iter()
                .map(|package| package.get_ref().label())
                .collect(),
        ),
    })
}

/// Whether a name or version is one that dependencies can be split at, and a terminal can be shown.
fn is_word(text: &str) -> bool {
    !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || c.is_control())
}

/// Splits `name[ version[ (source)]]`.
fn parts(dependency: &str) -> (&str, Option<&str>, Option<&str>) {
    let mut words = dependency.splitn(3, ' ');
    let name = words.next().unwrap_or_default();
    let version = words.next();
    let source = words
        .next()
        .map(|source| source.trim_start_matches('(').trim_end_matches(')'));
    (name, version, source)
}

/// The line, from 1, that a byte of a text is on.
fn line_of(text: &str, at: usize) -> u64 {
    let before = &text.as_bytes()[..at.min(text.len())];
    1 + before.iter().filter(|&&byte| byte == b'\n').count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Edges, String> {
        super::parse(Path::new("Cargo.lock"), text).map_err(|e| e.to_string())
    }

    /// The edges by name, sorted.
    fn named(edges: &Edges) -> Vec<(String, String)> {
        let name = |node| edges.labels.of(node);
        let mut named: Vec<_> = edges
            .list
            .iter()
            .map(|&(from, to)| (name(from), name(to)))
            .collect();
        named.sort();
        named
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter()
            .map(|&(a, b)| (a.to_owned(), b.to_owned()))
            .collect()
    }

    #[test]
    fn names_versions_and_sources() {
        let edges = parse(
            r#"
            version = 4

            [[package]]
            name = "app"
            version = "0.1.0"
            dependencies = ["a", "b 1.0.0", "b 2.0.0 (git+https://example.org/b)", "b 2.0.0 (registry+https://r)"]

            [[package]]
            name = "a"
            version = "3.0.0"
            source = "registry+https://r"
            checksum = "00"

            [[package]]
            name = "b"
            version = "1.0.0"
            dependencies = ["a"]

            [[package]]
            name = "b"
            version = "2.0.0"
            source = "git+https://example.org/b#0123abc"

            [[package]]
            name = "b"
            version = "2.0.0"
            source = "registry+https://r"

            [metadata]
            anything = "goes"
            "#,
        )
        .unwrap();
        assert_eq!(edges.nr_nodes, 5);
        assert_eq!(
            named(&edges),
            pairs(&[
                ("app 0.1.0", "a 3.0.0"),
                ("app 0.1.0", "b 1.0.0"),
                ("app 0.1.0", "b 2.0.0"),
                ("app 0.1.0", "b 2.0.0"),
                ("b 1.0.0", "a 3.0.0"),
            ])
        );
        // The two of one version are told apart by their source.
        assert!(edges.list.contains(&(0, 3)) && edges.list.contains(&(0, 4)));
    }

    #[test]
    fn the_first_format_has_a_root() {
        let edges = parse(
            "[root]\nname = \"app\"\nversion = \"0.1.0\"\ndependencies = [\"a 1.0.0 (registry+https://r)\"]\n\
             [[package]]\nname = \"a\"\nversion = \"1.0.0\"\nsource = \"registry+https://r\"\n",
        )
        .unwrap();
        assert_eq!(named(&edges), pairs(&[("app 0.1.0", "a 1.0.0")]));
    }

    #[test]
    fn our_own_lock_file() {
        let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.lock"));
        let edges = super::super::read(path, None).unwrap();
        let has_edge = |from: &str, to: &str| {
            named(&edges)
                .iter()
                .any(|(a, b)| a.split(' ').next() == Some(from) && b.split(' ').next() == Some(to))
        };
        assert!(
            has_edge("accel-sim", "svm")
                && has_edge("accel-sim", "clap")
                && has_edge("nix", "libc")
        );
        assert!(!has_edge("svm", "accel-sim"));
    }

    #[test]
    fn malformed_files_are_named_by_line() {
        let a = "[[package]]\nname = \"a\"\nversion = \"1.0.0\"\n";
        for (text, complaint) in [
            (String::new(), "1: no [[package]] in this file"),
            (
                "[[package]]\nname = \"a\"\n".to_owned(),
                "1: missing field `version`",
            ),
            (
                format!("{a}dependencies = [\n \"b\",\n]\n"),
                "5: dependency 'b' names no package of this file",
            ),
            (
                format!("{a}dependencies = [\"a 2.0.0\"]\n"),
                "4: dependency 'a 2.0.0' names no package of this file",
            ),
            (
                format!("{a}{}dependencies = [\"a\"]\n", a.replace("1.0.0", "2.0.0")),
                "7: dependency 'a' names more than one package of this file",
            ),
            (format!("{a}\n{a}"), "5: package 'a 1.0.0' is there twice"),
            (
                format!("{a}dependencies = \"b\"\n"),
                "4: invalid type: string \"b\", expected a sequence",
            ),
        ] {
            assert_eq!(
                parse(&text).unwrap_err(),
                format!("Cargo.lock:{complaint}"),
                "{text:?}"
            );
        }
        // What the TOML parser itself says is its own; the line is what is promised.
        let error = parse(&format!("{a}name = = 1\n")).unwrap_err();
        assert!(error.starts_with("Cargo.lock:4: "), "{error}");
    }
}
