//! Members of the workspace live here as flat files; see Cargo.toml.
