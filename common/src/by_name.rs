//! Structs that are read by the names of their fields only.
//!
//! The `Deserialize` that serde derives for a struct also reads an array, as the fields in order, and for an `Option`
//! also reads `null`. An empty array would then be a struct in which every optional field is absent. Where an absent
//! field means "no limit", both must be errors.

use serde::de::{Deserialize, Deserializer};

/// Reads the value of a field that is present. `null` is an error. `#[serde(default)]` handles an absent field.
pub(crate) fn given<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// Implements `Deserialize` for a struct with `#[serde(remote = "Self")]`, from a map only.
macro_rules! by_name_only {
    ($type:ty, $what:literal) => {
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct ByName;

                impl<'de> serde::de::Visitor<'de> for ByName {
                    type Value = $type;

                    fn expecting(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
                        formatter.write_str($what)
                    }

                    fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<$type, A::Error> {
                        <$type>::deserialize(serde::de::value::MapAccessDeserializer::new(map))
                    }
                }

                deserializer.deserialize_map(ByName)
            }
        }
    };
}

pub(crate) use by_name_only;
