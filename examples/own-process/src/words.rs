//! Counts the words of a text at a site.

use std::time::Duration;

use baton_worker::prelude::*;

/// How long the site may take to count.
const LIMIT: Duration = Duration::from_secs(60);

/// A text, and the site that counts its words.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Words {
    site: String,
    text: String,
}

impl Process for Words {
    fn start(input: &Value) -> Result<Self, Error> {
        read_input(input)
    }

    async fn advance(&mut self, context: &Context) -> Result<Advance, Error> {
        // First: without a session the advance ends here, and the worker repeats it when there is one.
        let site = context.site(&self.site).await?;
        let local = std::env::temp_dir().join(format!("own-words-{}", context.pid()));
        std::fs::write(&local, &self.text)?;
        site.put(&local, "text").await?;
        let counted = site.exec("wc -w < text > count", b"", LIMIT).await?;
        counted.ok().map_err(Error::failed)?;
        site.get("count", &local).await?;
        context.set_value("words", std::fs::read_to_string(&local)?.trim());
        std::fs::remove_file(&local)?;
        Ok(Advance::Finished { exit: 0 })
    }
}

#[cfg(test)]
mod tests {
    use baton_worker::testing::{Harness, Step};

    use super::*;

    #[test]
    fn words_are_counted_once_the_site_is_there() {
        let folder = std::env::temp_dir().join(format!("own-words-test-{}", std::process::id()));
        let mut words = Harness::new::<Words>(json!({"site": "cluster", "text": "one two three"}));
        words.add_site("cluster", &folder);
        words.set_site_up("cluster", false);
        assert!(matches!(words.advance(), Step::Waits(_)));
        words.set_site_up("cluster", true);
        assert_eq!(words.run_to_end().values["words"], "3");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
