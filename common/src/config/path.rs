//! Paths in a configuration.

use std::path::{Path, PathBuf};

/// Checks that a path has nothing that only a shell expands: no shell reads a configuration, so it would become the
/// name of a folder.
pub(super) fn check_literal(path: &Path) -> Result<(), String> {
    let text = path.to_string_lossy();
    let first = text.split('/').next().unwrap_or_default();
    let rest = text.split_once('/').map_or("", |(_, rest)| rest);
    if first.starts_with('$') {
        return Err(format!("is `{text}`: variables are not expanded; write `~/{rest}` or an absolute path"));
    }
    if first.starts_with('~') && first != "~" {
        return Err(format!("is `{text}`: `~USER` is not expanded; write an absolute path"));
    }
    Ok(())
}

/// Expands `~/` in a path of a configuration to the user's home folder.
///
/// # Errors
/// The problem, to be put after the name of the option.
pub fn from_home(path: &Path) -> Result<PathBuf, String> {
    check_literal(path)?;
    match path.strip_prefix("~") {
        Ok(rest) => {
            let home = std::env::home_dir().ok_or("begins with `~/`, but the home folder is unknown; set HOME")?;
            Ok(home.join(rest))
        }
        Err(_) => Ok(path.to_owned()),
    }
}
