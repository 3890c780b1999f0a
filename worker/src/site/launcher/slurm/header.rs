//! The `#SBATCH` lines of a job's script.

use std::fmt::Write as _;

use baton_common::config;
use baton_common::spec::{OnSite, Spec};

use crate::site::script::FOLDER;

/// Quotes a value for an `#SBATCH` line: `sbatch` interprets blanks and quotes outside double quotes.
fn header_word(value: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./:,=@%+".contains(&byte);
    if !value.is_empty() && value.bytes().all(is_plain) {
        return value.to_owned();
    }
    // Specs are checked for this; a line end would start another line of the script.
    let value = value.replace(char::is_control, " ");
    format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Returns the `#SBATCH` lines.
pub(super) fn header(spec: &Spec, on_site: &OnSite, site: &config::Site, dir: &str, token: &str) -> String {
    let mut header = String::new();
    let mut option = |name: &str, value: Option<String>| {
        let value = value.map(|value| format!("={}", header_word(&value))).unwrap_or_default();
        let _ = writeln!(header, "#SBATCH --{name}{value}");
    };
    option("job-name", Some(token.to_owned()));
    option("chdir", Some(dir.to_owned()));
    // `%` starts a pattern there.
    option("output", Some(format!("{}/{FOLDER}/launcher.out", dir.replace('%', "%%"))));
    // A requeued job would find `started` taken.
    option("no-requeue", None);
    let needs = &on_site.needs;
    for (name, value) in [("nodes", needs.nodes), ("ntasks", needs.ranks), ("cpus-per-task", needs.cpus)] {
        if let Some(value) = value {
            option(name, Some(value.to_string()));
        }
    }
    if let Some(bytes) = needs.mem {
        option("mem", Some(format!("{}M", bytes.div_ceil(1 << 20).max(1))));
    }
    if let Some(gpus) = needs.gpus {
        option("gpus-per-node", Some(gpus.to_string()));
    }
    if let Some(time) = spec.time {
        option("time", Some(time.as_secs().div_ceil(60).max(1).to_string()));
    }
    let mut native = site.native.clone();
    native.extend(on_site.native.clone());
    for (name, value) in native {
        option(&name, (!value.is_empty()).then_some(value));
    }
    header
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use baton_common::spec::Work;

    use super::*;

    #[test]
    fn a_value_with_blanks_is_one_word_for_slurm() {
        assert_eq!(header_word("a/b:c"), "a/b:c");
        assert_eq!(header_word("two words"), r#""two words""#);
        assert_eq!(header_word(r#"a"b\c"#), r#""a\"b\\c""#);
        assert_eq!(header_word("a\ntouch x"), r#""a touch x""#);
    }

    #[test]
    fn the_header_requests_the_resources_of_the_spec() {
        let mut spec = Spec::new(Work::Run { argv: vec!["true".into()] });
        spec.on_site = Some(OnSite::default());
        spec.time = Some(Duration::from_secs(61));
        let on_site = spec.on_site.as_mut().unwrap();
        on_site.needs.cpus = Some(4);
        on_site.needs.mem = Some((1 << 30) + 1);
        on_site.native = [("exclusive".to_owned(), String::new()), ("account".to_owned(), "a1".to_owned())].into();
        let on_site = on_site.clone();
        let site = toml::from_str("transport = 'local'\nlauncher = 'slurm'\nroot = '/r'").unwrap();
        let header = header(&spec, &on_site, &site, "/d", "baton-1-1");
        for wanted in [
            "--job-name=baton-1-1",
            "--no-requeue\n",
            "--cpus-per-task=4",
            "--mem=1025M",
            "--time=2",
            "--exclusive\n",
            "--account=a1",
        ] {
            assert!(header.contains(wanted), "{wanted} in\n{header}");
        }
    }
}
