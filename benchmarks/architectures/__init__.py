"""Every kind of base that people fine-tune, tiny and random: checked, trained, merged, and held against plain PEFT."""
