"""What a person does with releases: promote, compare, repeat, browse, mend."""
