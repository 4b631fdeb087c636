from experiments import chestxray14_input


def test_the_rows_of_a_build_are_made_of_its_two_halves():
    stored = {
        **{"size": 224, "batch_size": 64},
        "reading": [{"workers": 0, "images_per_second": 1557.22}],
        "reducing": {
            **{"from": [1024, 1024], "to": 224},
            "rates": [{"workers": 2, "images_per_second": 120.0}],
        },
    }
    plain = chestxray14_input.rows(stored)
    assert plain == [
        ("reading and decoding at 224 px, batch 64", "0 (threads)", "1,557.2", "0.02 h"),
        ("reducing 1024 x 1024 to 224 px", "2", "120.0", "0.26 h"),
    ]
    stored["building"] = {"images": 1000, "writing": 480.0}
    more = chestxray14_input.rows(stored)
    assert more[:2] == plain
    assert more[2][:3] == ("writing and verifying records of 224 px, 1,000 images", "1", "480.0")
    # An image takes 1/120 s and then 1/480 s: 5/480.
    assert more[3][1:] == ("2", "96.0", "0.32 h")
