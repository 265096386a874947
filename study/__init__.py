"""Running a study: data, backbone, features, training, search, confirmation, export."""
